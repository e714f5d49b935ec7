"""The Mamba-1 recurrence. Memory that must not be read holds NaN; what must not be written is compared."""

import pytest
import torch

from speculative_mamba.ops import selective_scan_verify
from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.ops.selective_scan_verify import SelectiveScanVerifyArgs, reference
from speculative_mamba.testing.scan import PER_TOKEN, copy, cut, make, split
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

PLAIN = {"write_slot": 0, "inputs": None, "left_padding": None, "final_state_only": False, "constant_weights": False}
CHANGES = [
    {},
    {"batch": 1},
    {"tokens": 1},
    {"tokens": 2},
    {"tokens": 16, "slots": 17},
    {"channels": 1},
    {"channels": 16},
    {"channels": 77},
    {"state_size": 1},
    {"state_size": 4},
    {"state_size": 5},
    {"state_size": 17},
    {"state_size": 33},
    {"b_groups": 1, "c_groups": 1},
    {"b_groups": 3},
    {"c_groups": 33},
    {"b_groups": 11, "c_groups": 3, "state_size": 17},
    {"b_groups": 3, "c_groups": 2, "channels": 48, "contiguous": True},
    {"gate": False},
    {"contiguous": True},
    {"contiguous": True, "state_size": 12, "tokens": 17, "slots": 17},
    {"contiguous": True, "state_size": 100},
    {"state_size": 129},
    {"slots": 5},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "tokens": 16, "slots": 17, "state_size": 5},
    {"dtype": torch.float16, "tokens": 16, "slots": 17, "state_size": 33, "contiguous": True},
]
rows = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")
dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


def run(inputs: dict, backend: str, **other: object) -> torch.Tensor:
    return selective_scan_verify(**{**inputs, **other}, backend=backend)


def steps(inputs: dict, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """y and state (B, T, D, N) of T calls of one token that each overwrite the one slot they read: plain decoding."""
    batch, tokens, _ = inputs["x"].shape
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
    y_double = reference.selective_scan_verify(SelectiveScanVerifyArgs(**double, **PLAIN))
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


groups = pytest.mark.parametrize(("b_groups", "c_groups"), [(1, 1), (None, 3), (2, None), (3, 4), (36, 2)], ids=str)


@groups
def test_a_group_serves_its_channels(b_groups: int | None, c_groups: int | None, backend: str) -> None:
    inputs = make({"channels": 36, "b_groups": b_groups, "c_groups": c_groups})
    expanded = copy(inputs)
    for name, count in (("B", b_groups or 1), ("C", c_groups or 1)):
        expanded[name] = inputs[name].reshape(3, 5, count, 16).repeat_interleave(36 // count, 2)
    assert_bitwise_equal(run(inputs, backend), run(expanded, backend), "y")
    assert_bitwise_equal(inputs["states"], expanded["states"], "slots")


@groups
def test_a_group_is_a_scan_of_its_channels(b_groups: int | None, c_groups: int | None, kernels: str) -> None:
    inputs = make({"channels": 36, "b_groups": b_groups, "c_groups": c_groups})
    alone = copy(inputs)
    y = run(inputs, kernels)
    for d in range(0, 36, 5):
        channel = {name: alone[name][..., d : d + 1] for name in ("x", "dt", "z", "D", "dt_bias")}
        channel |= {"A": alone["A"][d : d + 1], "states": alone["states"][:, :, d : d + 1].clone()}
        for name, count in (("B", b_groups), ("C", c_groups)):
            channel[name] = alone[name] if count is None else alone[name][:, :, d * count // 36]
        assert_bitwise_equal(run(alone | channel, kernels), y[..., d : d + 1], f"y of channel {d}")
        assert_bitwise_equal(channel["states"], inputs["states"][:, :, d : d + 1], f"slots of channel {d}")


@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
def test_threads_do_not_change_a_bit(final_state_only: bool, backend: str) -> None:
    inputs = make({"channels": 1001, "tokens": 7})
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


@dtypes
def test_rounds_with_rejections_equal_plain_decoding(dtype: torch.dtype, backend: str) -> None:
    inputs = make({"slots": 5, "dtype": dtype})
    plain = inputs["states"][:, :1].clone()
    zero = torch.zeros(3, dtype=torch.int32)
    for seed, accepted in enumerate([[0, 3, 4], [2, 0, 4], [1, 0, 3], [4, 2, 0]]):
        window = cut(make(seed=seed), states=inputs["states"], start_slot=inputs["start_slot"])
        y = run(window, backend)
        for b, count in enumerate(accepted):
            one = cut(window, slice(0, count + 1), slice(b, b + 1), states=plain[b : b + 1], start_slot=zero[:1])
            y_plain, states = steps(one, backend)
            assert_bitwise_equal(y[b : b + 1, : count + 1], y_plain, f"y of row {b} in round {seed}")
            plain[b] = states[0, -1]
        inputs["start_slot"].copy_(torch.tensor(accepted))


@pytest.mark.parametrize("nulls", [[1, 0, 0], [0, 5, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
@dtypes
def test_null_columns_leave_the_state_as_it_was(
    dtype: torch.dtype, nulls: list[int], final_state_only: bool, backend: str
) -> None:
    inputs = make({"dtype": dtype})
    inputs["states"][0, 0] = 0
    alone = copy(inputs)
    y = run(inputs, backend, final_state_only=final_state_only, left_padding=torch.tensor(nulls, dtype=torch.int32))
    for b, null in enumerate(nulls):
        rest = cut(alone, slice(null, None), slice(b, b + 1))
        y_alone, states = (
            steps(rest, backend) if null < 5 else (y[b : b + 1, 5:], rest["states"].new_empty(1, 0, 33, 16))
        )
        expected = torch.cat([alone["states"][b : b + 1, :1].expand(-1, null, -1, -1), states], 1)
        assert_bitwise_equal(y[b : b + 1, null:], y_alone, f"y of row {b}")
        written = inputs["states"][b : b + 1]
        actual, expected = (written[:, :1], expected[:, -1:]) if final_state_only else (written[:, :5], expected)
        assert_bitwise_equal(actual, expected, f"slots of row {b}")


@pytest.mark.parametrize("pieces", [[150], [64, 64, 22], [1, 70, 16, 63], [17] * 8 + [14]], ids=str)
@dtypes
def test_prefill_equals_verify_wherever_it_is_cut(dtype: torch.dtype, pieces: list[int], backend: str) -> None:
    inputs = make({"tokens": 150, "slots": 3, "batch": 1, "dtype": dtype})
    y_plain, states = steps(inputs, backend)
    y = [run(cut(part), backend, final_state_only=True) for part in split(inputs, pieces)]
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


def test_start_slot_is_read_at_every_call(backend: str) -> None:
    inputs = make({"slots": 12}, start=11)
    inputs["states"][:, 10] = torch.randn(3, 33, 16)
    first = run(inputs, backend)
    inputs["start_slot"].fill_(10)
    second = run(inputs, backend)
    assert not torch.equal(first, second)
    assert_bitwise_equal(second, steps(inputs, backend)[0], "y")


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


@pytest.mark.parametrize("name", ["x", "dt", "z", "B", "C", "states"])
@dtypes
def test_nan_reaches_exactly_what_depends_on_it(dtype: torch.dtype, name: str, backend: str) -> None:
    inputs = make({"dtype": dtype})
    expected = torch.zeros(3, 5, 33, dtype=torch.bool)
    if name == "states":
        inputs["states"][1, 0, 17, 3] = torch.nan
        expected[1, :, 17] = True
    else:
        inputs[name][1, 2, 3] = torch.nan
        tokens = slice(2, None) if name in ("x", "dt", "B") else slice(2, 3)
        expected[1, tokens, slice(None) if name in ("B", "C") else 3] = True
    assert_bitwise_equal(run(inputs, backend).isnan(), expected, "NaN")


@pytest.mark.parametrize("name", ["B", "C"])
def test_nan_of_a_group_stays_with_its_channels(name: str, backend: str) -> None:
    inputs = make({"b_groups": 3, "c_groups": 11})
    inputs[name][1, 2, 1, 3] = torch.nan
    expected = torch.zeros(3, 5, 33, dtype=torch.bool)
    if name == "B":
        expected[1, 2:, 11:22] = True
    else:
        expected[1, 2, 3:6] = True
    assert_bitwise_equal(run(inputs, backend).isnan(), expected, "NaN")


@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    inputs = make()
    for groups in (0, 2, 66):
        with pytest.raises(ValueError, match=f"^{name} has {groups} groups, which do not divide 33 channels$"):
            run(inputs | {name: torch.randn(3, 5, groups, 16)}, backend)
    with pytest.raises(ValueError, match=f"^{name} must be contiguous in its last two dimensions"):
        run(inputs | {name: torch.randn(3, 5, 3, 32)[..., :16]}, backend)
    for shape in [(5, 16), (3, 5, 1, 1, 16), (3, 5, 3, 15)]:
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            run(inputs | {name: torch.randn(shape)}, backend)


def test_a_step_of_zero_leaves_the_state_alone(backend: str) -> None:
    """Not a bit of it changes, whatever the token's x and B are."""
    inputs = make()
    inputs["states"][:, 0, :, ::2] = -0.0
    inputs["x"][:, :2], inputs["B"][:, :2] = torch.nan, torch.inf
    start = inputs["states"][:, 0].clone()
    run(inputs, backend, left_padding=torch.full((3,), 2, dtype=torch.int32))
    for slot in (0, 1):
        written = inputs["states"][:, slot].contiguous()
        assert_bitwise_equal(written.view(torch.int32), start.view(torch.int32), f"bits of slot {slot}")


def numbers_to_round(dtype: torch.dtype) -> torch.Tensor:
    """Every float32 where rounding to ``dtype`` may go wrong: all its values, what lies halfway between neighbours and
    just beside it, infinities, NaN; and random bits.
    """
    values = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].double()
    end = 2 * finite[-1:] - finite[-2:-1]  # where the value after the largest would be
    halfway = ((finite + torch.cat([finite[1:], end])) / 2).float()
    beside = [torch.nextafter(halfway, torch.tensor(to)) for to in (0.0, torch.inf)]
    positive = torch.cat([values, halfway, *beside])
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    return torch.cat([positive, -positive, bits.to(torch.int32).view(torch.float32)])


@dtypes
def test_the_state_is_rounded_as_by_torch(dtype: torch.dtype, backend: str) -> None:
    """With Δ = 32 and x = 1/32 a state of -0 becomes B, bit for bit."""
    state_size = 127
    numbers = numbers_to_round(torch.float16 if dtype == torch.float32 else dtype)
    B = numbers[: len(numbers) // state_size * state_size].view(1, 1, -1, state_size)
    channels = B.shape[2]
    one, zeros = torch.ones(1, 1, channels), torch.zeros(channels)
    states = torch.full((1, 1, channels, state_size), -0.0, dtype=dtype)
    selective_scan_verify(
        one / 32, one * 32, torch.zeros(channels, state_size), B, B, zeros, None, zeros, states,
        torch.zeros(1, dtype=torch.int32), backend=backend,
    )  # fmt: skip
    actual, expected = states, B.to(dtype)
    assert_bitwise_equal(actual, expected, "states")
    assert torch.equal(actual.signbit() | actual.isnan(), expected.signbit() | expected.isnan()), "signs"


def test_decays_are_accurate(kernels: str) -> None:
    """What is left of a state of 1 after Δ = 32: errors in decays near 1 add up over a text. Far away it is 0."""
    channels, state_size = 1024, 16
    A = torch.linspace(-1 / 32, 0, channels * state_size).view(channels, state_size)
    A[0, :4] = torch.tensor([-3.0, -100.0, -1e30, -torch.inf])
    x, zeros, start_slot = torch.zeros(1, 1, channels), torch.zeros(channels), torch.zeros(1, dtype=torch.int32)
    B, states = torch.ones(1, 1, state_size), torch.ones(1, 1, channels, state_size)
    selective_scan_verify(x, x + 32, A, B, B, zeros, None, zeros, states, start_slot, backend=kernels)
    decays, exact = states[0, 0].double(), (32 * A.double()).exp()
    assert decays[0, :4].max() < 1e-37
    assert (decays / exact - 1)[1:].abs().max() < 1.25 * torch.finfo(torch.float32).eps


@dtypes
def test_y_is_of_the_rounded_state(dtype: torch.dtype, backend: str) -> None:
    inputs = make({"dtype": dtype, "state_size": 1, "gate": False})
    inputs["C"].fill_(1)
    inputs["D"].fill_(0)
    y = run(inputs, backend)
    assert_bitwise_equal(y, inputs["states"][:, :5, :, 0].float(), "y")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.complex64], ids=str)
def test_other_state_dtypes_are_refused(dtype: torch.dtype, backend: str) -> None:
    inputs = make()
    with pytest.raises(ValueError, match=r"states must be torch.float32 or torch.bfloat16 or torch.float16, got"):
        run(inputs | {"states": torch.zeros(3, 8, 33, 16, dtype=dtype)}, backend)
