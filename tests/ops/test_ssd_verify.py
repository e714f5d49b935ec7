"""The Mamba-2 recurrence. Memory that must not be read holds NaN; what must not be written is compared."""

import math

import pytest
import torch

from speculative_mamba.ops import ssd_verify
from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.ops.ssd_verify import SsdVerifyArgs, reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

PLAIN = {"write_slot": 0, "inputs": None, "left_padding": None, "final_state_only": False, "constant_weights": False}
PER_TOKEN = ("x", "dt", "B", "C", "z")
BASE = {
    "batch": 3, "tokens": 5, "heads": 6, "head_size": 21, "state_size": 40, "x_heads": 6, "b_groups": 2, "c_groups": 3,
    "slots": 8, "gate": True, "skip_per_channel": False, "dt_limit": (0.0, math.inf), "contiguous": False,
    "dtype": torch.float32,
}  # fmt: skip
CHANGES = [
    {},
    {"batch": 1},
    {"tokens": 1},
    {"tokens": 2},
    {"tokens": 16, "slots": 17},
    {"tokens": 19, "slots": 20},
    {"heads": 1, "x_heads": 1, "b_groups": 1, "c_groups": 1},
    {"heads": 36},
    {"head_size": 1},
    {"head_size": 16},
    {"head_size": 64},
    {"state_size": 1},
    {"state_size": 5},
    {"state_size": 16},
    {"state_size": 17},
    {"state_size": 128},
    {"state_size": 129, "tokens": 17, "slots": 17},
    {"state_size": 300},
    {"x_heads": 2},
    {"x_heads": 1},
    {"b_groups": 1, "c_groups": 1},
    {"b_groups": 6, "c_groups": 1},
    {"skip_per_channel": True},
    {"gate": False},
    {"dt_limit": (0.01, 0.1)},
    {"contiguous": True},
    {"head_size": 32, "contiguous": True},
    {"head_size": 64, "state_size": 64, "x_heads": 2, "contiguous": True},
    {"head_size": 16, "state_size": 100, "tokens": 17, "slots": 17, "contiguous": True},
    {"slots": 5},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "tokens": 16, "slots": 17, "state_size": 5},
    {"dtype": torch.float16, "tokens": 16, "slots": 17, "state_size": 130, "contiguous": True},
]
rows = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")
dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
STATES = {torch.float32: 130, torch.bfloat16: 40, torch.float16: 128}  # more than registers hold in a pass, and fewer


def make(change: dict | None = None, seed: int = 0, start: int = 0) -> dict:
    """Arguments of the op, ``dtype`` that of the states.

    Inputs lie in wider tensors full of NaN; of the states only slot ``start`` is a number.
    """
    c = {**BASE, **(change or {})}
    batch, tokens, heads, head_size, state_size = (
        c[k] for k in ("batch", "tokens", "heads", "head_size", "state_size")
    )
    g = torch.Generator().manual_seed(seed)

    def window(*shape: int) -> torch.Tensor:
        size = math.prod(shape)
        wide = torch.full((batch, tokens, size if c["contiguous"] else size + 7), torch.nan)
        part = wide[..., :size] if c["contiguous"] else wide[..., 3 : 3 + size]
        return part.copy_(torch.randn(batch, tokens, size, generator=g)).unflatten(-1, shape)

    shape = (batch, c["slots"], 1 if c["contiguous"] else 2, heads, head_size, state_size)
    states = torch.full(shape, torch.nan, dtype=c["dtype"])[:, :, 0]
    states[:, start] = torch.randn(batch, heads, head_size, state_size, generator=g)
    return {
        "x": window(c["x_heads"], head_size),
        "dt": window(heads),
        "A": -torch.linspace(0.5, 12, heads),  # the same for every seed: replay feeds old inputs with it
        "B": window(c["b_groups"], state_size),
        "C": window(c["c_groups"], state_size),
        "D": torch.randn(*((heads, head_size) if c["skip_per_channel"] else (heads,)), generator=g),
        "dt_bias": torch.rand(heads, generator=g) * 3 - 4,
        "states": states,
        "start_slot": torch.full((batch,), start, dtype=torch.int32),
        "z": window(heads, head_size) if c["gate"] else None,
        "dt_limit": c["dt_limit"],
    }


def cut(inputs: dict, tokens: slice = slice(None), batch: slice = slice(None), **other: object) -> dict:
    """Views of some tokens and rows."""
    part = {k: v[batch, tokens] if k in PER_TOKEN and v is not None else v for k, v in inputs.items()}
    return {**part, "states": inputs["states"][batch], "start_slot": inputs["start_slot"][batch], **other}


def split(inputs: dict, pieces: list[int]) -> list[dict]:
    ends = torch.tensor(pieces).cumsum(0).tolist()
    return [cut(inputs, slice(end - length, end)) for end, length in zip(ends, pieces, strict=True)]


def copy(inputs: dict, **other: object) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} | other


def run(arguments: dict, backend: str, **other: object) -> torch.Tensor:
    return ssd_verify(**{**arguments, **other}, backend=backend)


def steps(inputs: dict, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """y and state (B, T, H, P, N) of T calls of one token, each overwriting the one slot it reads: plain decoding."""
    batch, tokens, _ = inputs["dt"].shape
    state = inputs["states"][torch.arange(batch), inputs["start_slot"].long()][:, None].clone()
    zero, y, states = torch.zeros(batch, dtype=torch.int32), [], []
    for t in range(tokens):
        y.append(run(cut(inputs, slice(t, t + 1), states=state, start_slot=zero), backend))
        states.append(state.clone())
    return torch.cat(y, 1), torch.cat(states, 1)


@rows
def test_error_is_within_twice_that_of_pytorch(change: dict, kernels: str) -> None:
    inputs = make(change)
    actual, single = copy(inputs), copy(inputs)
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    y = run(actual, kernels)
    y_single = run(single, "reference")
    y_double = reference.ssd_verify(SsdVerifyArgs(**double, **PLAIN))
    tokens = inputs["x"].shape[1]
    assert_accurate(y, y_single, y_double, what="y")
    # As float32, whose unit in the last place is the smaller one.
    states = [s["states"][:, :tokens] for s in (actual, single, double)]
    assert_accurate(states[0].float(), states[1].float(), states[2], what="states")


@rows
def test_one_call_equals_one_token_at_a_time(change: dict, backend: str) -> None:
    inputs = make(change)
    y_steps, states = steps(inputs, backend)
    assert_bitwise_equal(run(inputs, backend), y_steps, "y")
    assert_bitwise_equal(inputs["states"][:, : states.shape[1]], states, "slots")


@rows
def test_rows_do_not_see_each_other(change: dict, backend: str) -> None:
    inputs = make(change)
    alone = copy(inputs)
    y = run(inputs, backend)
    for b in range(len(y)):
        one = slice(b, b + 1)
        assert_bitwise_equal(run(cut(alone, batch=one), backend), y[one], f"y of row {b}")
        assert_bitwise_equal(alone["states"][one], inputs["states"][one], f"slots of row {b}")


@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
def test_threads_do_not_change_a_bit(final_state_only: bool, backend: str) -> None:
    inputs = make({"heads": 36, "tokens": 7})
    results = []
    for threads in (1, 2, 4, 4, 4, 3):
        torch.set_num_threads(threads)
        mine = copy(inputs)
        results.append((run(mine, backend, final_state_only=final_state_only), mine["states"]))
    for y, states in results[1:]:
        assert_bitwise_equal(y, results[0][0], "y")
        assert_bitwise_equal(states, results[0][1], "slots")


@pytest.mark.parametrize("write_slot", [0, 2, 3])
@pytest.mark.parametrize("start", [0, 4, 7])
@dtypes
def test_only_the_slots_of_the_window_are_written(
    dtype: torch.dtype, start: int, write_slot: int, backend: str
) -> None:
    inputs = make({"dtype": dtype}, start=start)
    snapshot, whole_before = copy(inputs), inputs["x"]._base.clone()
    y = run(inputs, backend, write_slot=write_slot)
    assert y.isfinite().all() and y.is_contiguous()
    written = slice(write_slot, write_slot + 5)
    assert_bitwise_equal(inputs["states"][:, written], steps(snapshot, backend)[1], "window")
    expected = snapshot["states"]
    expected[:, written] = inputs["states"][:, written]
    assert_bitwise_equal(inputs["states"], expected, "slots outside the window")
    assert inputs["states"]._base[:, :, 1].isnan().all(), "memory between the slots"
    assert_bitwise_equal(inputs["x"]._base, whole_before, "x")
    for name in (*PER_TOKEN, "A", "D", "dt_bias", "start_slot"):
        assert_bitwise_equal(inputs[name], snapshot[name], name)


@pytest.mark.parametrize("accepted", range(5))
@dtypes
def test_every_slot_is_a_place_to_continue_from(dtype: torch.dtype, accepted: int, backend: str) -> None:
    inputs, more = make({"dtype": dtype}, start=7), make(seed=1)
    plain = steps(inputs, backend)[1][:, accepted, None]
    run(inputs, backend)
    assert_bitwise_equal(inputs["states"][:, accepted, None], plain, "state")
    chosen = torch.full((3,), accepted, dtype=torch.int32)
    y = run(cut(more, states=inputs["states"], start_slot=chosen), backend)
    y_plain, states_plain = steps(cut(more, states=plain, start_slot=torch.zeros_like(chosen)), backend)
    assert_bitwise_equal(y, y_plain, "y")
    assert_bitwise_equal(inputs["states"][:, :5], states_plain, "slots")


@pytest.mark.parametrize("nulls", [[1, 0, 0], [0, 5, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
@dtypes
def test_null_columns_leave_the_state_as_it_was(
    dtype: torch.dtype, nulls: list[int], final_state_only: bool, backend: str
) -> None:
    inputs = make({"dtype": dtype})
    inputs["states"][0, 0] = -0.0
    alone = copy(inputs)
    y = run(inputs, backend, final_state_only=final_state_only, left_padding=torch.tensor(nulls, dtype=torch.int32))
    for b, null in enumerate(nulls):
        rest = cut(alone, slice(null, None), slice(b, b + 1))
        start = alone["states"][b : b + 1, :1]
        y_alone, states = steps(rest, backend) if null < 5 else (y[b : b + 1, 5:], start[:, :0])
        expected = torch.cat([start.expand(-1, null, -1, -1, -1), states], 1)
        assert_bitwise_equal(y[b : b + 1, null:], y_alone, f"y of row {b}")
        written = inputs["states"][b : b + 1]
        actual, expected = (written[:, :1], expected[:, -1:]) if final_state_only else (written[:, :5], expected)
        assert_bitwise_equal(actual, expected, f"slots of row {b}")
        assert torch.equal(actual.signbit(), expected.signbit()), "signs"


@pytest.mark.parametrize("pieces", [[100], [64, 36], [1, 47, 16, 36], [17] * 5 + [15]], ids=str)
@dtypes
def test_prefill_equals_verify_wherever_it_is_cut(dtype: torch.dtype, pieces: list[int], backend: str) -> None:
    inputs = make({"tokens": 100, "slots": 3, "batch": 1, "dtype": dtype, "state_size": STATES[dtype], "head_size": 3})
    y_plain, states = steps(inputs, backend)
    y = [run(part, backend, final_state_only=True) for part in split(inputs, pieces)]
    assert_bitwise_equal(torch.cat(y, 1), y_plain, "y")
    assert_bitwise_equal(inputs["states"][:, 0], states[:, -1], "slot 0")
    assert inputs["states"][:, 1:].isnan().all(), "prefill writes slot 0 only"


def test_prefill_may_start_from_any_slot(backend: str) -> None:
    inputs = make({"tokens": 40, "slots": 3}, start=2)
    start = inputs["states"][:, 2].clone()
    y_plain, states = steps(inputs, backend)
    assert_bitwise_equal(run(inputs, backend, final_state_only=True), y_plain, "y")
    assert_bitwise_equal(inputs["states"][:, 0], states[:, -1], "slot 0")
    assert_bitwise_equal(inputs["states"][:, 2], start, "the slot it started from")


def test_instruction_sets_with_fused_multiply_add_agree(fused_isas: list[str], select_isa: object) -> None:
    for change in CHANGES:
        results = []
        for isa in fused_isas:
            select_isa(isa)
            inputs = make(change)
            results.append((run(inputs, "cpu"), inputs["states"]))
        for y, states in results[1:]:
            assert_bitwise_equal(y, results[0][0], f"y, {change}")
            assert_bitwise_equal(states, results[0][1], f"slots, {change}")


@pytest.mark.parametrize("name", [*PER_TOKEN, "states", "A", "D", "dt_bias"])
@dtypes
def test_nan_reaches_exactly_what_depends_on_it(dtype: torch.dtype, name: str, backend: str) -> None:
    """Three heads share x head 1; group 1 of two is that of heads 3 to 5, of three that of heads 2 and 3."""
    inputs = make({"dtype": dtype, "x_heads": 2, "dt_limit": (0.01, 0.1)})
    expected = torch.zeros(3, 5, 6, 21, dtype=torch.bool)
    place, reached = {
        "x": ((1, 2, 1, 17), (1, slice(2, None), slice(3, 6), 17)),
        "dt": ((1, 2, 4), (1, slice(2, None), 4)),
        "B": ((1, 2, 1, 39), (1, slice(2, None), slice(3, 6))),
        "C": ((1, 2, 1, 39), (1, 2, slice(2, 4))),
        "z": ((1, 2, 4, 20), (1, 2, 4, 20)),
        "states": ((1, 0, 4, 20, 39), (1, slice(None), 4, 20)),
        "A": ((4,), (slice(None), slice(None), 4)),
        "D": ((4,), (slice(None), slice(None), 4)),
        "dt_bias": ((4,), (slice(None), slice(None), 4)),
    }[name]
    inputs[name][place] = torch.nan
    expected[reached] = True
    assert_bitwise_equal(run(inputs, backend).isnan(), expected, "NaN")


@dtypes
def test_y_is_of_the_rounded_state(dtype: torch.dtype, backend: str) -> None:
    inputs = make({"dtype": dtype, "state_size": 1, "gate": False})
    inputs["C"].fill_(1)
    inputs["D"].fill_(0)
    y = run(inputs, backend)
    assert_bitwise_equal(y, inputs["states"][:, :5, :, :, 0].float(), "y")


@pytest.mark.parametrize("name", ["x", "B", "C"])
def test_heads_that_share_are_heads_with_equal_values(name: str, backend: str) -> None:
    shared = make({"x_heads": 2})
    own = copy(shared)
    own[name] = own[name].repeat_interleave(6 // own[name].shape[2], 2)
    assert_bitwise_equal(run(shared, backend), run(own, backend), "y")
    assert_bitwise_equal(shared["states"], own["states"], "slots")


def test_skip_per_head_is_one_for_all_its_channels(backend: str) -> None:
    inputs = make()
    per_channel = copy(inputs, D=inputs["D"][:, None].repeat(1, 21))
    assert_bitwise_equal(run(inputs, backend), run(per_channel, backend), "y")


def test_limits_of_the_step(backend: str) -> None:
    """A step of ln 2 at A = -1 halves the state and adds ln 2 x B; steps of 0 change nothing."""
    inputs = make({"dt_limit": (math.log(2), math.log(2)), "tokens": 1, "x_heads": 6, "b_groups": 6, "gate": False})
    inputs["A"].fill_(-1)
    before = inputs["states"][:, 0].clone()
    run(inputs, backend)
    added = math.log(2) * inputs["x"][:, 0, ..., None] * inputs["B"][:, 0, :, None]
    torch.testing.assert_close(inputs["states"][:, 0], before / 2 + added)
    still = make({"dt_limit": (0.0, 0.0)})
    before = still["states"][:, :1].clone()
    run(still, backend)
    assert_bitwise_equal(still["states"][:, :5], before.expand(-1, 5, -1, -1, -1), "slots")


class Replay:
    """States in slots and their replayed twin, which are called alike. Inputs that were never written are NaN."""

    def __init__(self, first: dict, backend: str) -> None:
        batch, slots = first["states"].shape[:2]
        shapes = {name: (batch, slots, *first[name].shape[2:]) for name in ("x", "dt", "B")}
        self.inputs = ReplayBuffer(**{name: torch.full(shape, torch.nan) for name, shape in shapes.items()})
        self.inputs.dt[:, 0] = 0
        self.slots, self.start, self.backend = first["states"], first["start_slot"], backend
        self.start.zero_()
        self.kept = torch.full((batch, 2, *self.slots.shape[2:]), torch.nan, dtype=self.slots.dtype)[:, :1]
        self.kept.copy_(self.slots[:, :1])

    def call(self, window: dict, write_slot: int = 0, **other: object) -> torch.Tensor:
        """y, equal from both; the kept state and the inputs are what ``ReplayBuffer`` says."""
        start = self.slots[torch.arange(len(self.start)), self.start.long()]
        dt_before, kept_before = self.inputs.dt.clone(), self.kept.clone()
        same = {"start_slot": self.start, "write_slot": write_slot, **other}
        y = run({**window, "states": self.slots}, self.backend, **same)
        y_replay = run({**window, "states": self.kept}, self.backend, inputs=self.inputs, **same)
        assert_bitwise_equal(y_replay, y, "y")
        assert self.kept._base[:, 1].isnan().all(), "memory between the states"
        if other.get("final_state_only"):
            assert_bitwise_equal(self.kept[:, 0], self.slots[:, 0], "kept state")
            written = slice(0, 1)
            assert not self.inputs.dt[:, 0].any()
        else:
            assert_bitwise_equal(self.kept, start[:, None] if write_slot == 0 else kept_before, "kept state")
            written = slice(write_slot, write_slot + y.shape[1])
            for name in ("x", "B"):
                assert_bitwise_equal(getattr(self.inputs, name)[:, written], window[name], f"inputs.{name}")
        dt_before[:, written] = self.inputs.dt[:, written]
        assert_bitwise_equal(self.inputs.dt, dt_before, "inputs.dt outside the window")
        return y


@rows
def test_replay_equals_slots_over_rounds(change: dict, backend: str) -> None:
    first = make(change)
    tokens, both = first["x"].shape[1], Replay(first, backend)
    g = torch.Generator().manual_seed(1)
    for seed in range(4):
        both.call(make(change, seed))
        both.start.copy_(torch.randint(0, tokens, both.start.shape, generator=g))


@pytest.mark.parametrize("accepted", range(5))
@dtypes
def test_every_replayed_slot_is_that_of_single_steps(dtype: torch.dtype, accepted: int, backend: str) -> None:
    first = make({"dtype": dtype})
    states, both = steps(first, backend)[1], Replay(first, backend)
    both.call(first)
    both.start.fill_(accepted)
    both.call(make(seed=1))
    assert_bitwise_equal(both.kept[:, 0], states[:, accepted], "kept state")


@pytest.mark.parametrize(("tokens", "write_slots"), [(1, [1, 2, 3]), (2, [2, 3, 4]), (2, [1, 2, 3]), (2, [])], ids=str)
@dtypes
def test_replay_of_a_draft(dtype: torch.dtype, tokens: int, write_slots: list[int], backend: str) -> None:
    """A draft takes one or two tokens, then one at a time, each from the slot before."""
    both, seed = Replay(make({"dtype": dtype}), backend), 0
    for accepted in ([0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 1]):
        both.call(cut(make(seed=seed), slice(0, tokens)))
        for write_slot in write_slots:
            seed += 1
            both.start.fill_(write_slot - 1)
            both.call(cut(make(seed=seed), slice(0, 1)), write_slot)
        last = write_slots[-1] if write_slots else tokens - 1
        both.start.copy_(torch.tensor(accepted) * last)


@pytest.mark.parametrize("pieces", [[40], [1, 17, 22], [16, 24]], ids=str)
@dtypes
def test_replay_after_prefill(dtype: torch.dtype, pieces: list[int], backend: str) -> None:
    """Also after rounds: what was accepted last is fed before the prompt goes on."""
    prompt = make({"tokens": 40, "dtype": dtype, "state_size": STATES[dtype], "head_size": 3})
    both = Replay(prompt, backend)
    for accepted in ([0, 3, 4], [2, 0, 1]):
        for part in split(prompt, pieces):
            both.call(part, final_state_only=True)
            both.start.zero_()
        for _ in range(2):
            both.call(cut(prompt, slice(7, 12)))
            both.start.copy_(torch.tensor(accepted))


@pytest.mark.parametrize("nulls", [[1, 0, 0], [0, 5, 2], [2, 2, 2]], ids=str)
def test_null_columns_are_replayed_as_nothing(nulls: list[int], backend: str) -> None:
    first = make()
    first["states"][0, 0] = -0.0
    both = Replay(first, backend)
    columns = torch.tensor(nulls, dtype=torch.int32)
    window = copy(first)
    for b, null in enumerate(nulls):
        for name in ("x", "dt", "B"):
            window[name][b, :null] = torch.nan
    both.call(window, left_padding=columns)
    for accepted in ([0, 1, 2], [4, 4, 4]):
        both.start.copy_(torch.tensor(accepted))
        y = both.call(make(seed=1), left_padding=columns if accepted[0] else None)
    assert y.isfinite().all()


def test_replay_with_threads_and_instruction_sets(fused_isas: list[str], select_isa: object) -> None:
    """Heads read the inputs that they share before the first of them may overwrite any."""
    results = []
    for isa in fused_isas:
        select_isa(isa)
        for threads in (1, 2, 4, 4, 4, 3):
            torch.set_num_threads(threads)
            change = {"heads": 36, "x_heads": 2, "b_groups": 1, "head_size": 64}
            both, y = Replay(make(change), "cpu"), []
            for seed in range(3):
                y.append(both.call(make(change, seed)))
                both.start.copy_(torch.tensor([4, 2, 3]))
            results.append((torch.cat(y, 1), both.kept, both.inputs.dt))
    for result in results[1:]:
        for actual, expected, name in zip(result, results[0], ("y", "kept state", "inputs.dt"), strict=True):
            assert_bitwise_equal(actual, expected, name)


def replayed() -> dict:
    both = Replay(make(), "reference")
    return make() | {"states": both.kept, "inputs": both.inputs}


@pytest.mark.parametrize(
    ("match", "wrong"),
    {
        "D must have shape": {"D": torch.zeros(6, 20)},
        "D must be contiguous": {"D": torch.zeros(21, 6).T},
        "z must be contiguous in its last 2": {"z": torch.zeros(3, 5, 6, 22)[..., :21]},
        "x must be contiguous in its last 2": {"x": torch.zeros(3, 5, 6, 22)[..., :21]},
        "C must be contiguous in its last 2": {"C": torch.zeros(3, 5, 6, 40)[:, :, ::2]},
        "states must be contiguous in its last 3": {"states": torch.zeros(3, 8, 12, 21, 40)[:, :, ::2]},
        "heads of x must divide the 6 heads of dt, got 4": {"x": torch.zeros(3, 5, 4, 21)},
        "groups of B must divide": {"B": torch.zeros(3, 5, 4, 40)},
        "groups of C must divide": {"C": torch.zeros(3, 5, 12, 40)},
        r"dt_limit must be .*, got \(0.1, 0.01\)": {"dt_limit": (0.1, 0.01)},
        r"dt_limit must be .*, got \(-1.0, 1.0\)": {"dt_limit": (-1.0, 1.0)},
        r"dt_limit must be .*, got \(nan, 1.0\)": {"dt_limit": (math.nan, 1.0)},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(match: str, wrong: dict, backend: str) -> None:
    inputs = make()
    before = inputs["states"].clone()
    with pytest.raises(ValueError, match=match) as caught:
        run(inputs, backend, **wrong)
    assert "\n" not in str(caught.value)
    assert_bitwise_equal(inputs["states"], before, "states")


@pytest.mark.parametrize(
    ("match", "wrong"),
    {
        "states must have shape": {"states": torch.zeros(3, 8, 6, 21, 40)},
        "write_slot 2 continues": {"write_slot": 2, "start_slot": torch.tensor([1, 0, 1], dtype=torch.int32)},
        "5 tokens from slot 4": {"write_slot": 4, "start_slot": torch.full((3,), 3, dtype=torch.int32)},
        "inputs.dt must have shape": {"dt": torch.zeros(3, 8, 5)},
        "inputs.dt must have 3 dimensions": {"dt": torch.zeros(3, 8)},
        "inputs.x must have shape": {"x": torch.zeros(3, 7, 6, 21)},
        "inputs.x must be torch.float32": {"x": torch.zeros(3, 8, 6, 21).bfloat16()},
        "inputs.B must be contiguous": {"B": torch.zeros(3, 8, 4, 40)[:, :, :2]},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_replay_that_does_not_fit_is_refused(match: str, wrong: dict, backend: str) -> None:
    inputs = replayed()
    before, kept = inputs["states"].clone(), inputs["inputs"]
    wrong = {"inputs": ReplayBuffer(**{**vars(kept), **wrong})} if wrong.keys() <= {"x", "dt", "B"} else wrong
    with pytest.raises(ValueError, match=match) as caught:
        run(inputs, backend, **wrong)
    assert "\n" not in str(caught.value)
    assert_bitwise_equal(inputs["states"], before, "states")
    assert kept.x.isnan().all()
