"""The questions that every op with a window of tokens answers alike on every backend; ops of rows answer those that
concern them. Memory that must not be read holds NaN; what must not be written is compared.
"""

import functools
import math
from collections import defaultdict

import pytest
import torch
from cases import ATTENTION, EXPERT_LINEAR, LINEAR, OPS, SCANS, WINDOWS
from description import Arguments, Op, Row

from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.ops.recording import record
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

of_all = pytest.mark.ops(*OPS)
of_windows = pytest.mark.ops(*WINDOWS)
of_scans = pytest.mark.ops(*SCANS)
dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str = "") -> None:
    for name in expected:
        assert_bitwise_equal(actual[name], expected[name], f"{name} {where}")


def parts(op: Op, results: dict[str, torch.Tensor], after: Arguments, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Results, and what each slot holds after the call: in float32, whose unit in the last place is the smaller one, or
    float64. Entries beyond a length are NaN."""
    slots = {
        f"{name} of slot {t}": torch.nan_to_num(part.to(dtype))
        for t in range(op.num_tokens(after) if op.written else 0)
        for name, part in op.slot(after, t).items()
    }
    return results | slots


@functools.lru_cache(maxsize=8)  # the kernels of a row follow each other
def specified(row: Row, seed: int) -> tuple[Arguments, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Arguments, and the specification's ``parts`` in float32 and in float64."""
    op, arguments = row.op, row.make(seed)
    single = op.copy(arguments)
    wanted = parts(op, op.results(single, "reference"), single, torch.float32)
    return arguments, wanted, parts(op, *op.exact(op.copy(arguments)), torch.float64)


@of_all
def test_error_is_within_twice_that_of_pytorch(row: Row, kernels: str) -> None:
    """Of results, and of what the slots hold; the largest of several draws, as the largest of one is mostly luck.

    Catches: a term left out, a lane or a feature too many, a wrong group, the scale of another row of the weight.
    """
    op, found = row.op, defaultdict(list)
    for seed in range(4 if kernels == "cpu" else 1):  # where a draw costs little
        arguments, wanted, exact = specified(row, seed)
        after = op.copy(arguments)
        actual = parts(op, op.results(after, kernels), after, torch.float32)
        for name in exact:
            found[name].append((actual[name], wanted[name], exact[name]))
    for name, draws in found.items():
        assert_accurate(*map(torch.stack, zip(*draws, strict=True)), what=name)


@of_windows
def test_one_call_equals_one_token_at_a_time(row: Row, backend: str) -> None:
    """Catches: an order of summation that depends on T, a slot left out, no rounding between the tokens of a call, a
    barrier left out."""
    op, arguments = row.op, row.make()
    y_steps, states = op.steps(arguments, backend)
    y = op.run(arguments, backend)
    assert y.isfinite().all() and y.is_contiguous()
    assert_bitwise_equal(y, y_steps, "y")
    for t, state in enumerate(states):
        assert_same(op.slot(arguments, t), state, f"of slot {t}")


@of_all
def test_rows_do_not_see_each_other(row: Row, backend: str) -> None:
    """Catches: sums in an order that depends on the number of rows, strides or lengths of another row."""
    op, arguments = row.op, row.make()
    alone = op.copy(arguments)
    together = op.results(arguments, backend)
    for b in range(len(together["y"])):
        one = slice(b, b + 1)
        result = op.results(op.cut(alone, batch=one), backend)
        assert_same(result, {name: tensor[one] for name, tensor in together.items()}, f"of row {b}")


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """All that the tensor is a part of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@of_all
def test_nothing_but_the_window_is_written(op: Op, backend: str) -> None:
    """Wherever it starts and goes. Catches: a history read after it was overwritten, one that is written whatever the
    write slot is, tokens beyond the window."""
    for start, write_slot in ((0, 0), (4, 0), (7, 0), (1, 2), (0, 2), (7, 3)) if op.written else ((None, None),):
        arguments = op.make(start=start or 0)
        tensors = {name: part for name, part in arguments.items() if torch.is_tensor(part)}
        before, other, masks = {name: memory(part).clone() for name, part in tensors.items()}, {}, {}
        if op.written:
            other, tokens = {"write_slot": write_slot}, op.num_tokens(arguments)
            masks, (y_steps, states) = op.touched(arguments, write_slot, tokens), op.steps(arguments, backend)
        y = op.run(arguments, backend, **other)
        for name, tensor in tensors.items():
            kept = torch.ones(len(before[name]), dtype=torch.bool)
            if name in masks:
                kept.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[masks[name]] = False
            assert_bitwise_equal(memory(tensor)[kept], before[name][kept], f"{name} from {start} to {write_slot}")
        if op.written:
            assert_bitwise_equal(y, y_steps, "y")
            follows = write_slot in (0, start + 1) or "window" not in op.written  # whose slots share their inputs
            for t, state in enumerate(states if follows else ()):
                assert_same(op.slot(arguments, write_slot + t), state, f"of slot {write_slot + t}")
        for result in op.results(arguments, backend, **other).values() if not op.written else ():
            result.fill_(7)  # nothing that is returned is an argument
            assert_same({name: memory(tensor) for name, tensor in tensors.items()}, before)


@dtypes
@of_windows
def test_rounds_with_rejections_equal_plain_decoding(op: Op, dtype: torch.dtype, backend: str) -> None:
    """From any slot, whatever each row accepts. Catches: a start slot read once, one too early or of another row."""
    change = {"dtype": dtype}
    arguments = op.make(change, start=7)
    plain = op.one_slot(arguments)
    for round_, accepted in enumerate([[0, 3, 4], [2, 0, 4], [1, 0, 3], [4, 2, 0]]):
        arguments, plain = (op.more(part, change, round_) for part in (arguments, plain))
        y = op.run(arguments, backend)
        for b, count in enumerate(accepted):
            row = slice(b, b + 1)
            y_plain, states = op.walk(op.cut(plain, slice(0, count + 1), row), backend)
            assert_bitwise_equal(y[row, : count + 1], y_plain, f"y of row {b} in round {round_}")
            state = {name: part[row] for name, part in op.slot(arguments, count).items()}
            assert_same(state, states[-1], f"of row {b} in round {round_}")
        op.accept(arguments, accepted)


@pytest.mark.parametrize("lengths", [[2, 1, 1, 1], [1, 1, 1, 1], [2, 3, 1, 2], [4, 4]], ids=str)
@of_windows
def test_calls_of_one_round_continue_from_the_slot_before(op: Op, lengths: list[int], backend: str) -> None:
    """As a draft runs: two tokens, then one at a time. Catches: a write slot that is taken for 0."""
    arguments = op.make({"tokens": sum(lengths)}, start=3)
    y_steps, states = op.steps(arguments, backend)
    y, written = [], 0
    for part in op.split(arguments, lengths):
        if written:
            arguments["start_slot"].fill_(written - 1)
        y.append(op.run(part, backend, write_slot=written))
        written += op.num_tokens(part)
    assert_bitwise_equal(torch.cat(y, 1), y_steps, "y")
    for t, state in enumerate(states):
        assert_same(op.slot(arguments, t), state, f"of slot {t}")


@dtypes
@of_windows
def test_left_padding_leaves_no_trace(op: Op, dtype: torch.dtype, backend: str) -> None:
    """An empty history, or any state, stays as it was to the last bit: also zeros below 0, whatever is in the tokens.

    Catches: one column too many or too few, Δ = 0 that turns -0 into +0, padding that takes a position or makes a row
    shorter, y of a padding that is set for one head of a group.
    """
    arguments, left_paddings = op.make({"dtype": dtype} | getattr(op, "GATED", {}), start=1), [0, 5, 2]
    for name, state in op.slot(arguments).items():
        if name == "history":
            state.zero_()
        elif name == "state":
            state[1:] = torch.where(state[1:] < 0, -0.0, state[1:])
        op.put(arguments, op.slot(arguments) | {name: state})
    for b, left in enumerate(left_paddings):
        for name in op.per_token:
            arguments[name][b, :left] = math.nan
    alone = op.copy(arguments)
    rows = [op.cut(alone, slice(left, None), slice(b, b + 1)) for b, left in enumerate(left_paddings)]
    wanted = [op.steps(row, backend) if op.num_tokens(row) else (None, []) for row in rows]
    for other in ({}, {"write_slot": 2}, {"final_state_only": True}):
        given = op.copy(arguments)
        y = op.run(given, backend, left_padding=torch.tensor(left_paddings, dtype=torch.int32), **other)
        for b, (left, (y_alone, states)) in enumerate(zip(left_paddings, wanted, strict=True)):
            if states:
                assert_bitwise_equal(y[b : b + 1, left:], y_alone, f"y of row {b}")
            if op is ATTENTION:  # which says so
                assert_bitwise_equal(y[b, :left], torch.zeros_like(y[b, :left]), f"y of padding, row {b}")
            states = [op.slot(rows[b])] * left + states
            if "final_state_only" in other:
                states = states[-1:]
            for t, state in enumerate(states, other.get("write_slot", 0)):
                held = {name: part[b : b + 1] for name, part in op.slot(given, t).items()}
                assert_same(held, state, f"of slot {t}, row {b}")


@pytest.mark.parametrize("rows", [1, 3])
@dtypes
@of_windows
def test_prefill_equals_verify_wherever_it_is_cut(op: Op, dtype: torch.dtype, rows: int, backend: str) -> None:
    """From any slot; slot 0 alone is written. Catches: a state that is rounded only where a slot is written, a
    history that is left one row too early."""
    change = {"tokens": 70, "dtype": dtype, "capacity": 115, "slots": 3}
    change |= {"batch": 1, "lengths": (40,)} if rows == 1 else {}
    before = op.make(change, start=2)
    y_steps, states = op.steps(before, backend)
    for pieces in ([70], [64, 6]) if rows == 1 else ([1, 33, 16, 20], [17] * 4 + [2]):
        arguments, y = op.copy(before), []
        for part in op.split(arguments, pieces):
            y.append(op.run(part, backend, final_state_only=True))
            arguments["start_slot"].zero_()
        assert_bitwise_equal(torch.cat(y, 1), y_steps, f"y of {pieces}")
        assert_same(op.slot(arguments, 0), states[-1], f"of slot 0, {pieces}")
        for name, mask in op.touched(before, 0, 1).items():
            assert_bitwise_equal(arguments[name][~mask], before[name][~mask], f"{name} of other slots, {pieces}")


@of_all
def test_threads_do_not_change_a_bit(op: Op, processor: str) -> None:
    """Catches: a pool that drops or repeats a chunk."""
    if processor == "reference" and op in (LINEAR, EXPERT_LINEAR):
        pytest.skip("PyTorch promises no bits for products of matrices")
    for other in ({}, {"final_state_only": True}) if op.written else ({},):
        arguments, results = op.make(op.large), []
        for threads in (1, 2, 4, 4, 4, 3):
            torch.set_num_threads(threads)
            results.append(op.results(op.copy(arguments), processor, **other))
            assert_same(results[-1], results[0], f"with {threads} threads")


@of_all
def test_instruction_sets_with_fused_multiply_add_agree(op: Op, fused_isas: list[str], select_isa: object) -> None:
    """But tiles, which have an order of their own for a weight in bfloat16 (``test_linear_tiles.py``).

    Catches: lanes that are summed in another order where they are more.
    """
    for row in op.rows():
        results = []
        weight = row.make().get("weight") if op is LINEAR else None
        by_tiles = isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16 and weight.shape[1] >= 512
        for isa in fused_isas:
            if by_tiles and isa.startswith("amx"):
                continue
            select_isa(isa)
            results.append(op.results(row.make(), "cpu"))
            assert_same(results[-1], results[0], f"of {row}")


@dtypes
@of_all
def test_nan_reaches_exactly_what_depends_on_it(op: Op, dtype: torch.dtype, backend: str) -> None:
    """Catches: max(x, 0) of a NaN, a NaN that is rounded to infinity, the group or the row of another, a feature behind
    the last."""
    for name, place, reached in op.nan:
        change = op.nan_change | ({"dtype": dtype} if "dtype" in op.base else {})
        change |= getattr(op, "GATED", {}) if name.endswith("gate") else {}
        arguments = op.make(change)
        arguments[name][place] = math.nan
        y = op.run(arguments, backend)
        expected = torch.zeros(y.shape, dtype=torch.bool)
        expected[reached] = True
        assert_bitwise_equal(y.isnan(), expected, f"NaN of {name}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter
@of_all
def test_infinities_reach_what_they_reach_in_pytorch(op: Op, backend: str) -> None:
    """Each argument in turn. Catches: an exponential or a limit that turns what is not finite into a number."""
    change = {"dt_limit": (0.01, 0.1), "tokens": 2}
    for name, tensor in op.make(change).items():
        if not torch.is_tensor(tensor) or not tensor.is_floating_point():
            continue
        for value in (math.inf, -math.inf):
            finite = []
            for kind in ("reference", backend):
                arguments = op.make(change)
                arguments[name][(0,) * tensor.ndim] = value
                results = op.results(arguments, kind)
                finite.append({what: part.isfinite() for what, part in results.items()})
            assert_same(finite[1], finite[0], f"is finite with {name} {value}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter
@of_scans
@pytest.mark.parametrize("state_size", [5, 16, 40])
def test_an_infinite_input_does_the_same_however_the_text_is_cut(op: Op, state_size: int, backend: str) -> None:
    """Catches: infinity times zero in a lane that has no state, which a slot forgets and a register does not."""
    arguments = op.make({"state_size": state_size, "tokens": 3})
    for name in ("B", "C", "D"):  # infinity less infinity would be NaN everywhere
        arguments[name].abs_()
    arguments["x"][:, 0] = math.inf
    y_steps, _ = op.steps(arguments, backend)
    assert_bitwise_equal(op.run(arguments, backend).isnan(), y_steps.isnan(), "NaN of y")
    assert y_steps.isinf().any()


def replaying(op: Op, arguments: Arguments) -> Arguments:
    """The same with one state, of the start slot, and inputs of which the rows have read three."""
    inputs = op.buffer(arguments, arguments["states"].shape[1])
    for name, part in vars(inputs).items():
        part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(len(name))))
    kept = op.slot(arguments)["state"][:, None].clone()
    return arguments | {"states": kept, "inputs": inputs, "start_slot": arguments["start_slot"].fill_(2)}


def written_by(op: Op, arguments: Arguments) -> dict[str, torch.Tensor]:
    inputs = vars(arguments["inputs"]) if arguments.get("inputs") else {}
    return {name: arguments[name] for name in op.written} | {f"inputs.{name}": part for name, part in inputs.items()}


@pytest.mark.parametrize("other", [{}, {"write_slot": 1}, {"final_state_only": True}], ids=str)
@of_windows
def test_rows_that_are_left_out(op: Op, other: dict, backend: str) -> None:
    """With start slot -1 y is 0, nothing of a row is read or written, and the others go on as if alone; with slots and
    with inputs to be replayed. Catches: a row's slot -1 that is read, buffers of the wrong row, y left unset.
    """
    for mode in ("slots", "inputs") if op in SCANS else ("slots",):
        for left_out in ([0], [2], [0, 1, 2]):
            arguments = op.make(start=0)
            arguments = replaying(op, arguments) if mode == "inputs" else arguments
            if other.get("write_slot"):
                arguments["start_slot"].zero_()
            padding = torch.tensor([2, 1, 0], dtype=torch.int32) if "final_state_only" in other else None
            arguments["start_slot"][left_out] = -1
            for tensor in written_by(op, arguments).values():
                tensor[left_out] = math.nan if tensor.is_floating_point() else 10**9
            others = [row for row in range(3) if row not in left_out]
            alone = op.copy(op.cut(arguments, batch=others))
            if mode == "inputs":
                alone["inputs"] = type(alone["inputs"])(*(part[others] for part in vars(alone["inputs"]).values()))
            before = {name: tensor.clone() for name, tensor in written_by(op, arguments).items()}
            y = op.run(arguments, backend, left_padding=padding, **other)
            assert not y[left_out].any(), "y of the rows that are left out"
            left = {name: tensor[left_out] for name, tensor in written_by(op, arguments).items()}
            assert_same(left, {name: tensor[left_out] for name, tensor in before.items()}, "of the rows left out")
            y_alone = op.run(alone, backend, left_padding=None if padding is None else padding[others], **other)
            assert_bitwise_equal(y[others], y_alone, "y of the others")
            kept = {name: tensor[others] for name, tensor in written_by(op, arguments).items()}
            assert_same(kept, written_by(op, alone), "of the others")


@of_all
def test_no_rows(op: Op, backend: str) -> None:
    """Catches: a grid without blocks."""
    arguments = op.make()
    for name, result in op.results(op.cut(arguments, batch=slice(0, 0)), backend).items():
        assert len(result) == 0 and result.dtype in (torch.float32, torch.int32), name


@of_windows
def test_no_tokens_are_refused(op: Op, backend: str) -> None:
    """And then nothing is written."""
    arguments = op.make()
    before = op.copy(arguments)
    with pytest.raises(ValueError, match=r"^x must hold at least one token per row$"):
        op.run(op.cut(arguments, slice(0, 0)), backend)
    assert_same(arguments, {name: before[name] for name in op.written})


@of_windows
def test_a_recorded_call_follows_start_slot(op: Op, cpu: str) -> None:
    """Catches: a start slot that is frozen at the first call."""
    recorded, plain = op.make(), op.make()
    y, recording = record(torch.empty(0), op.run, recorded, cpu)
    for round_, accepted in enumerate([[4, 0, 2], [1, 4, 0], [3, 3, 3]]):
        if round_:
            recording.run()
        assert_bitwise_equal(y, op.run(plain, cpu), f"y of round {round_}")
        for arguments in (recorded, plain):
            op.accept(arguments, accepted)
        assert_same(op.slot(recorded), op.slot(plain), f"after round {round_}")


@dtypes
@of_scans
def test_y_is_of_the_rounded_state(op: Op, dtype: torch.dtype, backend: str) -> None:
    """With one state of weight 1, no gate and no skip y is the state. Catches: y of the state before it is rounded."""
    arguments = op.make({"dtype": dtype, "state_size": 1, "gate": False})
    arguments["C"].fill_(1)
    arguments["D"].fill_(0)
    y = op.run(arguments, backend)
    assert_bitwise_equal(y, arguments["states"][:, :5, ..., 0].float(), "y")
