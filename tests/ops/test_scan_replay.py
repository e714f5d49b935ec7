"""Checkpoints by replay: the same scans with a state per slot and with one state and the inputs since, bit for bit.

Memory that must not be read holds NaN; what must not be written is compared.
"""

import dataclasses

import pytest
import torch

from speculative_mamba.ops import selective_scan_verify
from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.ops.recording import Recording
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.testing.scan import BASE, cut, make, split
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "selective_scan_verify"

FIXED = ("A", "D", "dt_bias")
CHANGES = [
    {},
    {"batch": 1},
    {"channels": 1},
    {"channels": 77},
    {"state_size": 5},
    {"state_size": 33},
    {"gate": False},
    {"contiguous": True},
    {"b_groups": 1},
    {"b_groups": 3, "c_groups": 11},
    {"b_groups": 33, "state_size": 17},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": torch.float16, "state_size": 17, "b_groups": 11},
]
rows = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")
dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


class Twins:
    """One layer in both modes. Every call compares all that the two have in common."""

    def __init__(self, change: dict | None = None, slots: int = 8) -> None:
        self.change = {**BASE, **(change or {}), "slots": slots}
        arguments = make(self.change, seed=99)
        self.fixed = {name: arguments[name] for name in FIXED}
        self.states, self.start_slot = arguments["states"], arguments["start_slot"]
        batch, _, channels, state_size = self.states.shape
        self.whole = self.states.new_full((batch, 1, 2, channels, state_size), torch.nan)
        self.kept = self.whole[:, :, 0]
        self.kept[:] = self.states[:, :1]
        self.inputs = ReplayBuffer(
            torch.full((batch, slots, channels), torch.nan),
            torch.full((batch, slots, channels), torch.nan),
            torch.full((batch, slots, self.change["b_groups"] or 1, state_size), torch.nan),
        )
        self.inputs.dt[:, 0] = 0

    def window(self, tokens: int, seed: int) -> dict:
        return {**make({**self.change, "tokens": tokens}, seed), **self.fixed}

    def call(self, window: dict, backend: str, write_slot: int = 0, **other: object) -> torch.Tensor:
        other |= {"write_slot": write_slot, "backend": backend}
        here = torch.arange(len(self.states)), self.start_slot.long()
        kept = (self.states[here] if write_slot == 0 else self.kept[:, 0]).clone()
        inputs = dataclasses.replace(self.inputs, **{k: v.clone() for k, v in vars(self.inputs).items()})
        y = selective_scan_verify(**{**window, "states": self.states, "start_slot": self.start_slot}, **other)
        replay = {**window, "states": self.kept, "start_slot": self.start_slot, "inputs": self.inputs}
        assert_bitwise_equal(selective_scan_verify(**replay, **other), y, "y")

        tokens, nulls = window["x"].shape[1], other.get("left_padding")
        if other.get("final_state_only"):
            kept, inputs.dt[:, 0] = self.states[:, 0], 0
        else:
            written = slice(write_slot, write_slot + tokens)
            inputs.x[:, written], inputs.dt[:, written] = window["x"], self.inputs.dt[:, written]
            inputs.B[:, written] = window["B"].reshape(inputs.B[:, written].shape)
            null = torch.zeros(len(y), 1) if nulls is None else nulls[:, None]
            null = (torch.arange(tokens) < null)[..., None].expand_as(y)
            assert_bitwise_equal(self.inputs.dt[:, written] == 0, null, "inputs that count as nothing")
        assert_bitwise_equal(self.kept[:, 0], kept, "the kept state")
        for name, expected in vars(inputs).items():
            assert_bitwise_equal(getattr(self.inputs, name), expected, f"inputs.{name}")
        assert self.whole[:, :, 1].isnan().all(), "memory beside the kept state"
        return y

    def accept(self, counts: list[int] | torch.Tensor) -> None:
        """What the next call starts from; nothing else that is left may be read."""
        self.start_slot.copy_(torch.as_tensor(counts))
        for b, count in enumerate(self.start_slot.tolist()):
            for tensor in (*vars(self.inputs).values(), self.states):
                tensor[b, count + 1 :] = torch.nan
            self.states[b, :count] = torch.nan

    def accept_any(self, tokens: int, seed: int) -> None:
        self.accept(torch.randint(tokens, self.start_slot.shape, generator=torch.Generator().manual_seed(seed)))


@rows
def test_rounds_equal_those_with_a_state_per_slot(change: dict, backend: str) -> None:
    twins = Twins(change)
    for seed, tokens in enumerate([5, 1, 8, 2, 7, 4]):
        y = twins.call(twins.window(tokens, seed), backend)
        assert y.isfinite().all()
        twins.accept_any(tokens, seed)


@pytest.mark.parametrize("lengths", [[2, 1, 1, 1], [1, 1, 1, 1], [2, 3, 1, 2], [4, 4]], ids=str)
@dtypes
def test_tokens_that_follow_in_the_same_round(dtype: torch.dtype, lengths: list[int], backend: str) -> None:
    """As a draft runs: the calls after the first start from the slot before the one they write."""
    twins = Twins({"dtype": dtype, "b_groups": 3})
    for round_ in range(4):
        written = 0
        for window in split(twins.window(sum(lengths), round_), lengths):
            if written:
                twins.start_slot.fill_(written - 1)
            twins.call(window, backend, written)
            written += window["x"].shape[1]
        twins.accept_any(sum(lengths), round_)


@pytest.mark.parametrize("accepted", range(5))
@rows
def test_every_slot_is_a_place_to_continue_from(change: dict, accepted: int, backend: str) -> None:
    """As after single tokens that each overwrite the one state: plain decoding."""
    twins, plain = Twins(change), Twins(change)
    window, more = twins.window(5, 0), twins.window(5, 1)
    twins.call(window, backend)
    twins.accept([accepted] * len(twins.states))
    y = twins.call(more, backend)
    singles = [cut(window, slice(t, t + 1)) for t in range(accepted + 1)]
    singles += [cut(more, slice(t, t + 1)) for t in range(5)]
    y_plain = [plain.call(single, backend) for single in singles]
    assert_bitwise_equal(y, torch.cat(y_plain[accepted + 1 :], 1), "y")
    assert_bitwise_equal(twins.states[:, 4], plain.states[:, 0], "the state at the end")


@pytest.mark.parametrize("pieces", [[1], [16], [17], [40, 1, 33], [3, 2, 64]], ids=str)
@dtypes
def test_prefill_wherever_it_is_cut(dtype: torch.dtype, pieces: list[int], backend: str) -> None:
    twins = Twins({"dtype": dtype})
    for piece in split(twins.window(sum(pieces), 0), pieces):
        twins.call(piece, backend, final_state_only=True)
        twins.accept([0, 0, 0])
        for tensor in (twins.inputs.x, twins.inputs.B):
            tensor.fill_(torch.nan)  # slot 0 is the state itself
    for seed in (1, 2):
        twins.call(twins.window(5, seed), backend)
        twins.accept_any(5, seed)
    twins.call(twins.window(21, 3), backend, final_state_only=True)  # from any slot
    twins.accept([0, 0, 0])
    twins.call(twins.window(3, 4), backend)


@pytest.mark.parametrize("nulls", [[1, 0, 4], [0, 5, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
@dtypes
def test_null_columns_of_the_first_window(
    dtype: torch.dtype, final_state_only: bool, nulls: list[int], backend: str
) -> None:
    twins = Twins({"dtype": dtype, "c_groups": 3})
    left_padding = torch.tensor(nulls, dtype=torch.int32)
    twins.call(twins.window(5, 0), backend, left_padding=left_padding, final_state_only=final_state_only)
    twins.accept([0, 0, 0] if final_state_only else [2, 4, 3])
    for b, null in enumerate(nulls):
        for tensor in (twins.inputs.x, twins.inputs.B):
            tensor[b, :null] = torch.nan
    for seed in (1, 2):
        assert twins.call(twins.window(4, seed), backend).isfinite().all()
        twins.accept_any(4, seed)


def test_null_columns_behind_the_first_call(backend: str) -> None:
    twins = Twins()
    first, second = split(twins.window(5, 0), [2, 3])
    twins.call(first, backend, left_padding=torch.tensor([2, 1, 0], dtype=torch.int32))
    twins.start_slot.fill_(1)
    twins.call(second, backend, 2, left_padding=torch.tensor([1, 0, 2], dtype=torch.int32))
    twins.accept([3, 4, 2])
    twins.call(twins.window(4, 1), backend)


def test_an_input_without_step_counts_as_nothing_in_its_channel(backend: str) -> None:
    twins = Twins()
    twins.call(twins.window(3, 0), backend)
    twins.accept([2, 2, 2])
    twins.inputs.dt[1, 1, 7] = 0
    window, results = twins.window(2, 1) | {"start_slot": twins.start_slot}, []
    for x in (1.0, torch.nan):
        inputs, kept = ReplayBuffer(*(tensor.clone() for tensor in vars(twins.inputs).values())), twins.kept.clone()
        inputs.x[1, 1, 7] = x
        y = selective_scan_verify(**window | {"states": kept}, inputs=inputs, backend=backend)
        results.append((y, kept))
    for name, actual, expected in zip(("y", "state"), *results, strict=True):
        assert expected.isfinite().all()
        assert_bitwise_equal(actual, expected, name)


@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
@dtypes
def test_long_windows(dtype: torch.dtype, final_state_only: bool, backend: str) -> None:
    """More tokens, and more inputs to replay, than a kernel holds in registers."""
    twins = Twins({"dtype": dtype, "channels": 19}, slots=60)
    twins.call(twins.window(35, 0), backend)
    twins.accept([34, 16, 0])
    twins.call(twins.window(17, 1), backend)
    twins.start_slot.fill_(16)
    twins.call(twins.window(40, 2), backend, 17)
    twins.accept([56, 15, 31])
    twins.call(twins.window(33, 3), backend, final_state_only=final_state_only)


@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
def test_threads_do_not_change_a_bit(final_state_only: bool, backend: str) -> None:
    results = []
    for threads in (1, 2, 4, 4, 4, 3):
        torch.set_num_threads(threads)
        twins = Twins({"channels": 1001})
        twins.call(twins.window(7, 0), backend)
        twins.accept([6, 0, 3])
        y = twins.call(twins.window(7, 1), backend, final_state_only=final_state_only)
        results.append((y, twins.kept, *vars(twins.inputs).values()))
    for result in results[1:]:
        for name, actual, expected in zip(("y", "state", "x", "dt", "B"), result, results[0], strict=True):
            assert_bitwise_equal(actual, expected, name)


@rows
def test_rows_do_not_see_each_other(change: dict, backend: str) -> None:
    twins = Twins(change)
    twins.call(twins.window(5, 0), backend)
    twins.accept_any(5, 0)
    alone = [tensor.clone() for tensor in vars(twins.inputs).values()]
    kept, window = twins.kept.clone(), twins.window(5, 1) | {"start_slot": twins.start_slot}
    y = twins.call(window, backend)
    for b in range(len(y)):
        one = slice(b, b + 1)
        row = cut(window | {"states": kept}, batch=one)
        inputs = ReplayBuffer(*(tensor[one] for tensor in alone))
        assert_bitwise_equal(selective_scan_verify(**row, inputs=inputs, backend=backend), y[one], f"y of row {b}")
        assert_bitwise_equal(kept[one], twins.kept[one], f"state of row {b}")


def test_instruction_sets_with_fused_multiply_add_agree(fused_isas: list[str], select_isa: object) -> None:
    for change in CHANGES:
        results = []
        for isa in fused_isas:
            select_isa(isa)
            twins = Twins(change)
            twins.call(twins.window(5, 0), "cpu")
            twins.accept_any(5, 0)
            results.append((twins.call(twins.window(5, 1), "cpu"), twins.kept, *vars(twins.inputs).values()))
        for result in results[1:]:
            for name, actual, expected in zip(("y", "state", "x", "dt", "B"), result, results[0], strict=True):
                assert_bitwise_equal(actual, expected, f"{name}, {change}")


def test_a_recorded_call_follows_start_slot(cpu: str) -> None:
    twins, recorded = Twins(), Twins()
    window = twins.window(4, 0)
    arguments = {**window, "states": recorded.kept, "start_slot": recorded.start_slot, "inputs": recorded.inputs}
    recording = Recording(torch.empty(0))
    with recording.record():
        y = selective_scan_verify(**arguments, backend=cpu)
    for seed in range(4):
        if seed:
            recording.run()
        assert_bitwise_equal(y, twins.call(window, cpu), f"y of round {seed}")
        assert_bitwise_equal(recorded.kept, twins.kept, f"state of round {seed}")
        for each in (twins, recorded):
            each.accept_any(4, seed)


def refused(match: str, backend: str, inputs: dict | None = None, **wrong: object) -> None:
    twins = Twins()
    given = dataclasses.replace(twins.inputs, **(inputs or {}))
    arguments = {**twins.window(5, 0), "states": twins.kept, "start_slot": twins.start_slot, "inputs": given, **wrong}
    before = [tensor.clone() for tensor in (twins.kept, *vars(twins.inputs).values())]
    with pytest.raises(ValueError, match=match) as caught:
        selective_scan_verify(**arguments, backend=backend)
    assert "\n" not in str(caught.value)
    for tensor, expected in zip((twins.kept, *vars(twins.inputs).values()), before, strict=True):
        assert_bitwise_equal(tensor, expected, "written before the error")


@pytest.mark.parametrize("name", ["x", "dt", "B"])
def test_inputs_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    tensor = getattr(Twins().inputs, name)
    wide = torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
    wrong = {
        rf"inputs.{name} must be torch.float32": tensor.double(),
        rf"inputs.{name} is on meta": tensor.to("meta"),
        rf"inputs.{name} must have": tensor[None],
        rf"inputs.{name} must have shape": torch.cat([tensor, tensor[:1]]),
        rf"inputs.{name} must be contiguous": wide,
        rf"inputs.{name} must be contiguous.*": tensor.repeat_interleave(2, -1)[..., ::2],
    }
    for match, value in wrong.items():
        refused(match, backend, {name: value})
    refused(r"inputs.\w+ must have shape", backend, {name: tensor[:, :-1].contiguous()})


def test_calls_that_do_not_fit_are_refused(backend: str) -> None:
    refused(r"states must have shape \(3, 1, 33, 16\)", backend, states=torch.zeros(3, 8, 33, 16))
    refused("5 tokens from slot 4 on do not fit into 8 slots", backend, write_slot=4)
    refused(r"start_slot must be in \[0, 8\)", backend, start_slot=torch.tensor([0, 8, 0], dtype=torch.int32))
    refused("inputs.B must have shape", backend, B=torch.randn(3, 5, 3, 16))
    start_slot = torch.tensor([1, 0, 1], dtype=torch.int32)
    refused(
        r"write_slot 2 continues from slot 1 in every row, got start_slot \[1, 0, 1\]",
        backend,
        write_slot=2,
        start_slot=start_slot,
    )
