"""Replay: a scan with one state and the inputs since gives the bits of a scan with a state in every slot.

Memory that must not be read holds NaN; what must not be written is compared.
"""

import dataclasses
import math

import pytest
import torch
from cases import SCANS
from description import Arguments, Op, Row

from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.ops.recording import record
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.testing.tolerance import assert_bitwise_equal

pytestmark = pytest.mark.ops(*SCANS)
dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
FEW_CHANNELS = {"channels": 19, "head_size": 3}  # where it is tokens that matter
modes = pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])


class Twins:
    """A layer that keeps a state per slot, and its twin that keeps one. Every call compares all they have in common."""

    def __init__(self, op: Op, change: dict | None = None) -> None:
        self.op, self.change = op, change or {}
        self.slots = op.make(self.change)
        kept = torch.full_like(self.slots["states"][:, :2], math.nan)[:, :1]
        kept.copy_(self.slots["states"][:, :1])
        self.replay = self.slots | {"states": kept, "inputs": op.buffer(self.slots, self.slots["states"].shape[1])}

    def window(self, seed: int, tokens: int | None = None) -> Arguments:
        """What the call takes in."""
        return self.op.make(self.change | ({} if tokens is None else {"tokens": tokens}), seed)

    def call(self, window: Arguments, backend: str, write_slot: int = 0, **other: object) -> torch.Tensor:
        slots, kept, inputs = self.slots, self.replay["states"], self.replay["inputs"]
        tokens = {name: window[name] for name in self.op.per_token}
        before = self.op.slot(slots)["state"] if write_slot == 0 else kept[:, 0].clone()
        expected = {name: part.clone() for name, part in vars(inputs).items()}
        other |= {"write_slot": write_slot, "backend": backend}
        y = self.op.run(slots | tokens, **other)
        assert_bitwise_equal(self.op.run(self.replay | tokens, **other), y, "y")

        count, left_paddings = y.shape[1], other.get("left_padding")
        if other.get("final_state_only"):
            before, expected["dt"][:, 0] = slots["states"][:, 0], 0
        else:
            written = slice(write_slot, write_slot + count)
            for name in ("x", "B"):
                expected[name][:, written] = tokens[name].reshape(expected[name][:, written].shape)
            expected["dt"][:, written] = inputs.dt[:, written]
            left = torch.zeros(len(y), 1) if left_paddings is None else left_paddings[:, None]
            left = (torch.arange(count) < left)[..., None].expand_as(inputs.dt[:, written])
            assert_bitwise_equal(inputs.dt[:, written] == 0, left, "inputs that count as nothing")
        assert_bitwise_equal(kept[:, 0], before, "the kept state")
        for name, part in expected.items():
            assert_bitwise_equal(getattr(inputs, name), part, f"inputs.{name}")
        assert kept._base[:, 1].isnan().all(), "memory beside the kept state"
        return y

    def accept(self, slots: list[int]) -> None:
        """What the next call starts from; nothing else that is left may be read."""
        self.op.accept(self.slots, slots)
        for b, slot in enumerate(slots):
            for part in vars(self.replay["inputs"]).values():
                part[b, slot + 1 :] = math.nan

    def accept_any(self, round_: int, tokens: int) -> None:
        self.accept([(3 * round_ + 2 * b) % tokens for b in range(len(self.slots["start_slot"]))])


def test_rounds_equal_those_with_a_state_per_slot(row: Row, backend: str) -> None:
    """Catches: one input too few, a kept state that is not replaced or not rounded, inputs written before all have read
    them."""
    twins = Twins(row.op, row.change)
    tokens = twins.op.num_tokens(twins.slots)
    rounds = [tokens, 1, max(1, tokens - 3), tokens]
    for round_, count in enumerate(rounds[:-1] if backend == "triton" else rounds):
        assert twins.call(twins.window(round_, count), backend).isfinite().all()
        twins.accept_any(round_, count)


@pytest.mark.parametrize("lengths", [[2, 1, 1, 1], [1, 1, 1, 1], [2, 3, 1, 2], [4, 4]], ids=str)
@dtypes
def test_calls_of_one_round(op: Op, dtype: torch.dtype, lengths: list[int], backend: str) -> None:
    """As a draft runs: the calls after the first start from the slot before the one they write.

    Catches: a kept state that is replaced where the window goes on.
    """
    twins = Twins(op, {"dtype": dtype})
    for round_ in range(3):
        written = 0
        for part in op.split(twins.window(round_, sum(lengths)), lengths):
            if written:
                twins.slots["start_slot"].fill_(written - 1)
            twins.call(part, backend, written)
            written += op.num_tokens(part)
        twins.accept_any(round_, sum(lengths))


@pytest.mark.parametrize("pieces", [[1], [17], [20, 1, 19], [3, 2, 33]], ids=str)
@dtypes
def test_prefill_wherever_it_is_cut(op: Op, dtype: torch.dtype, pieces: list[int], backend: str) -> None:
    """Before rounds and after them: what was accepted last is replayed before the prompt goes on."""
    twins = Twins(op, {"dtype": dtype} | (FEW_CHANNELS if sum(pieces) > 1 else {}))
    for first in (0, 10):
        for piece in op.split(twins.window(first, sum(pieces)), pieces):
            twins.call(piece, backend, final_state_only=True)
            twins.accept([0, 0, 0])
            for name in ("x", "B"):
                getattr(twins.replay["inputs"], name).fill_(math.nan)  # slot 0 is the state itself
        for round_ in (first + 1, first + 2):
            twins.call(twins.window(round_), backend)
            twins.accept_any(round_, 5)


@modes
@dtypes
def test_left_padding_is_replayed_as_nothing(op: Op, dtype: torch.dtype, final_state_only: bool, backend: str) -> None:
    """Catches: a step of zero that is replayed, and turns -0 into +0."""
    twins = Twins(op, {"dtype": dtype})
    for states in (twins.slots["states"], twins.replay["states"]):
        states[0, 0] = torch.where(states[0, 0] < 0, -0.0, states[0, 0])
    window, left_paddings = twins.window(0), [2, 0, 5]
    for b, left in enumerate(left_paddings):
        for name in ("x", "dt", "B"):
            window[name][b, :left] = math.nan
    left_padding = torch.tensor(left_paddings, dtype=torch.int32)
    twins.call(window, backend, left_padding=left_padding, final_state_only=final_state_only)
    twins.accept([0, 0, 0] if final_state_only else [4, 2, 3])
    for round_ in (1, 2):
        assert twins.call(twins.window(round_), backend).isfinite().all()
        twins.accept_any(round_, 5)


def test_left_padding_behind_the_first_call(op: Op, backend: str) -> None:
    twins = Twins(op)
    first, second = op.split(twins.window(0), [2, 3])
    twins.call(first, backend, left_padding=torch.tensor([2, 1, 0], dtype=torch.int32))
    twins.slots["start_slot"].fill_(1)
    twins.call(second, backend, 2, left_padding=torch.tensor([1, 0, 2], dtype=torch.int32))
    twins.accept([3, 4, 2])
    twins.call(twins.window(1), backend)


def test_an_input_without_step_counts_as_nothing(op: Op, backend: str) -> None:
    """In its channel or head alone."""
    twins = Twins(op)
    twins.call(twins.window(0, 3), backend)
    twins.accept([2, 2, 2])
    twins.replay["inputs"].dt[1, 1, 4] = 0
    results = []
    for x in (1.0, math.nan):
        inputs = ReplayBuffer(*(tensor.clone() for tensor in vars(twins.replay["inputs"]).values()))
        inputs.x[1, 1, 4] = x
        kept = twins.replay["states"].clone()
        window = {name: part for name, part in twins.window(1, 2).items() if name in op.per_token}
        y = op.run(twins.replay | window | {"states": kept, "inputs": inputs}, backend)
        results.append((y, kept))
    for name, actual, expected in zip(("y", "state"), *results, strict=True):
        assert expected.isfinite().all()
        assert_bitwise_equal(actual, expected, name)


@modes
@dtypes
def test_long_windows(op: Op, dtype: torch.dtype, final_state_only: bool, backend: str) -> None:
    """More tokens, and more inputs to replay, than a kernel holds in registers."""
    twins = Twins(op, {"dtype": dtype, "slots": 60, **FEW_CHANNELS})
    twins.call(twins.window(0, 35), backend)
    twins.accept([34, 16, 0])
    twins.call(twins.window(1, 17), backend)
    twins.slots["start_slot"].fill_(16)
    twins.call(twins.window(2, 40), backend, 17)
    twins.accept([56, 15, 31])
    twins.call(twins.window(3, 33), backend, final_state_only=final_state_only)


def results_of(op: Op, change: dict, backend: str, **other: object) -> dict[str, torch.Tensor]:
    """After two rounds."""
    twins = Twins(op, change)
    twins.call(twins.window(0), backend)
    twins.accept([4, 0, 3][: len(twins.slots["start_slot"])])
    y = twins.call(twins.window(1), backend, **other)
    return {"y": y, "state": twins.replay["states"], **vars(twins.replay["inputs"])}


@modes
def test_threads_do_not_change_a_bit(op: Op, final_state_only: bool, processor: str) -> None:
    """Catches: a head that overwrites inputs which another has still to read."""
    results = []
    for threads in (1, 2, 4, 4, 4, 3):
        torch.set_num_threads(threads)
        change = op.large | {"x_heads": 2, "b_groups": 1, "head_size": 64}
        results.append(results_of(op, change, processor, final_state_only=final_state_only))
        for name, expected in results[0].items():
            assert_bitwise_equal(results[-1][name], expected, name)


def test_instruction_sets_with_fused_multiply_add_agree(op: Op, fused_isas: list[str], select_isa: object) -> None:
    for change in [row.change for row in op.rows() if row.change.get("tokens", 5) > 4]:
        results = []
        for isa in fused_isas:
            select_isa(isa)
            results.append(results_of(op, change, "cpu"))
            for name, expected in results[0].items():
                assert_bitwise_equal(results[-1][name], expected, f"{name}, {change}")


def test_rows_do_not_see_each_other(row: Row, backend: str) -> None:
    op, together = row.op, Twins(row.op, row.change).replay
    op.run(together, backend)
    tokens = op.num_tokens(together)
    together["start_slot"].copy_((6 + 2 * torch.arange(len(together["start_slot"]))) % tokens)
    together |= {name: part for name, part in row.make(1).items() if name in op.per_token}
    alone = together | {"states": together["states"].clone()}
    inputs = [part.clone() for part in vars(together["inputs"]).values()]
    y = op.run(together, backend)
    for b in range(len(y)):
        one = slice(b, b + 1)
        mine = op.cut(alone, batch=one) | {"inputs": ReplayBuffer(*(part[one] for part in inputs))}
        assert_bitwise_equal(op.run(mine, backend), y[one], f"y of row {b}")
        assert_bitwise_equal(alone["states"][one], together["states"][one], f"state of row {b}")


def test_a_recorded_call_follows_start_slot(op: Op, cpu: str) -> None:
    twins, recorded = Twins(op), Twins(op)
    window = twins.window(0)
    tokens = {name: part for name, part in window.items() if name in op.per_token}
    y, recording = record(torch.empty(0), op.run, recorded.replay | tokens, cpu)
    for round_ in range(4):
        if round_:
            recording.run()
        assert_bitwise_equal(y, twins.call(window, cpu), f"y of round {round_}")
        assert_bitwise_equal(recorded.replay["states"], twins.replay["states"], f"state of round {round_}")
        for each in (twins, recorded):
            each.accept_any(round_, 5)


def refused(op: Op, match: str, backend: str, inputs: dict | None = None, **wrong: object) -> None:
    twins = Twins(op)
    before = [tensor.clone() for tensor in (twins.replay["states"], *vars(twins.replay["inputs"]).values())]
    given = dataclasses.replace(twins.replay["inputs"], **(inputs or {}))
    with pytest.raises(ValueError, match=match) as caught:
        op.run(twins.replay | {"inputs": given} | wrong, backend)
    assert "\n" not in str(caught.value)
    for tensor, kept in zip((twins.replay["states"], *vars(twins.replay["inputs"]).values()), before, strict=True):
        assert_bitwise_equal(tensor, kept, "written before the error")


@pytest.mark.parametrize("name", ["x", "dt", "B"])
def test_inputs_that_do_not_fit_are_refused(op: Op, name: str, backend: str) -> None:
    tensor = getattr(Twins(op).replay["inputs"], name)
    wide = torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
    for match, value in {
        rf"inputs.{name} must be torch.float32": tensor.double(),
        rf"inputs.{name} is on meta": tensor.to("meta"),
        rf"inputs.{name} must have": tensor[None],
        rf"inputs.{name} must have shape": torch.cat([tensor, tensor[:1]]),
        rf"inputs.{name} must be contiguous": wide,
        rf"inputs.{name} must be contiguous.*": tensor.repeat_interleave(2, -1)[..., ::2],
        r"inputs.\w+ must have shape": tensor[:, :-1].contiguous(),
    }.items():
        refused(op, match, backend, {name: value})


def test_calls_that_do_not_fit_are_refused(op: Op, backend: str) -> None:
    twins, arguments = Twins(op), op.make()
    shape = rf"\({', '.join(map(str, twins.replay['states'].shape))}\)"
    refused(op, rf"states must have shape {shape}", backend, states=arguments["states"])
    refused(op, "5 tokens from slot 4 on do not fit into 8 slots", backend, write_slot=4)
    refused(op, r"start_slot must be in \[0, 8\)", backend, start_slot=torch.tensor([0, 8, 0], dtype=torch.int32))
    refused(op, "inputs.B must have shape", backend, B=torch.randn(3, 5, 3, arguments["B"].shape[-1]))
    match = r"write_slot 2 continues from slot 1 in every row, got start_slot \[1, 0, 1\]"
    refused(op, match, backend, write_slot=2, start_slot=torch.tensor([1, 0, 1], dtype=torch.int32))
