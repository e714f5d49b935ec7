"""The Mamba-1 recurrence: groups, rounding, decays. The rest is in ``test_window_contract.py``."""

import pytest
import torch
from cases import SELECTIVE_SCAN

from speculative_mamba.ops import selective_scan_verify
from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.testing.tolerance import assert_bitwise_equal

dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
groups = pytest.mark.parametrize(("b_groups", "c_groups"), [(1, 1), (None, 3), (2, None), (3, 4), (36, 2)], ids=str)


@groups
def test_a_group_serves_its_channels(b_groups: int | None, c_groups: int | None, backend: str) -> None:
    inputs = SELECTIVE_SCAN.make({"channels": 36, "b_groups": b_groups, "c_groups": c_groups})
    expanded = SELECTIVE_SCAN.copy(inputs)
    for name, count in (("B", b_groups or 1), ("C", c_groups or 1)):
        expanded[name] = inputs[name].reshape(3, 5, count, 16).repeat_interleave(36 // count, 2)
    assert_bitwise_equal(SELECTIVE_SCAN.run(inputs, backend), SELECTIVE_SCAN.run(expanded, backend), "y")
    assert_bitwise_equal(inputs["states"], expanded["states"], "slots")


@groups
def test_a_group_is_a_scan_of_its_channels(b_groups: int | None, c_groups: int | None, kernels: str) -> None:
    inputs = SELECTIVE_SCAN.make({"channels": 36, "b_groups": b_groups, "c_groups": c_groups})
    alone = SELECTIVE_SCAN.copy(inputs)
    y = SELECTIVE_SCAN.run(inputs, kernels)
    for d in range(0, 36, 5):
        channel = {name: alone[name][..., d : d + 1] for name in ("x", "dt", "z", "D", "dt_bias")}
        channel |= {"A": alone["A"][d : d + 1], "states": alone["states"][:, :, d : d + 1].clone()}
        for name, count in (("B", b_groups), ("C", c_groups)):
            channel[name] = alone[name] if count is None else alone[name][:, :, d * count // 36]
        assert_bitwise_equal(SELECTIVE_SCAN.run(alone | channel, kernels), y[..., d : d + 1], f"y of channel {d}")
        assert_bitwise_equal(channel["states"], inputs["states"][:, :, d : d + 1], f"slots of channel {d}")


@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    inputs = SELECTIVE_SCAN.make()
    for groups in (0, 2, 66):
        with pytest.raises(ValueError, match=f"^{name} has {groups} groups, which do not divide 33 channels$"):
            SELECTIVE_SCAN.run(inputs | {name: torch.randn(3, 5, groups, 16)}, backend)
    with pytest.raises(ValueError, match=f"^{name} must be contiguous in its last two dimensions"):
        SELECTIVE_SCAN.run(inputs | {name: torch.randn(3, 5, 3, 32)[..., :16]}, backend)
    for shape in [(5, 16), (3, 5, 1, 1, 16), (3, 5, 3, 15)]:
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            SELECTIVE_SCAN.run(inputs | {name: torch.randn(shape)}, backend)


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
    """With Δ = 32 and x = 1/32 a state of -0 becomes B, bit for bit. Catches: ties away from zero."""
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
    """What is left of a state of 1 after Δ = 32: errors in decays near 1 add up over a text. Far away it is 0.

    Catches: a polynomial of degree five, as accurate as `ex2.approx`.
    """
    channels, state_size = 1024, 16
    A = torch.linspace(-1 / 32, 0, channels * state_size).view(channels, state_size)
    A[0, :4] = torch.tensor([-3.0, -100.0, -1e30, -torch.inf])
    x, zeros, start_slot = torch.zeros(1, 1, channels), torch.zeros(channels), torch.zeros(1, dtype=torch.int32)
    B, states = torch.ones(1, 1, state_size), torch.ones(1, 1, channels, state_size)
    selective_scan_verify(x, x + 32, A, B, B, zeros, None, zeros, states, start_slot, backend=kernels)
    decays, exact = states[0, 0].double(), (32 * A.double()).exp()
    assert decays[0, :4].max() < 1e-37
    assert (decays / exact - 1)[1:].abs().max() < 1.25 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.complex64], ids=str)
def test_other_state_dtypes_are_refused(dtype: torch.dtype, backend: str) -> None:
    inputs = SELECTIVE_SCAN.make()
    with pytest.raises(ValueError, match=r"states must be torch.float32 or torch.bfloat16 or torch.float16, got"):
        SELECTIVE_SCAN.run(inputs | {"states": torch.zeros(3, 8, 33, 16, dtype=dtype)}, backend)


@pytest.mark.parametrize("begins", [0, 1, 16])
def test_many_slots(cpu: str, begins: int) -> None:
    """So many bytes that they go past the caches, where they are whole lines: the bits of token after token. The slots
    begin some floats into their memory; the last channels are a part of a block, and a state is one more line.

    Catches: a line that is written where none begins (the process dies), slots of another token.
    """
    inputs = SELECTIVE_SCAN.make({"channels": 1030, "state_size": 32})
    memory = torch.zeros(begins + inputs["states"].numel())
    inputs["states"] = memory[begins:].view(inputs["states"].shape).copy_(inputs["states"])
    assert inputs["states"].nbytes > 2 * 256 * 1024
    steps = SELECTIVE_SCAN.copy(inputs)
    y = SELECTIVE_SCAN.run(inputs, cpu)
    for t in range(y.shape[1]):
        step = {name: steps[name][:, t : t + 1] for name in ("x", "dt", "z", "B", "C")}
        row = {"start_slot": steps["start_slot"] if t == 0 else torch.full_like(steps["start_slot"], t - 1)}
        for b in range(y.shape[0]):
            one = {name: value[b : b + 1] for name, value in (step | row).items()}
            states = steps["states"][b : b + 1]
            got = selective_scan_verify(
                one["x"], one["dt"], steps["A"], one["B"], one["C"], steps["D"], one["z"], steps["dt_bias"], states,
                one["start_slot"], t, backend=cpu,
            )  # fmt: skip
            assert_bitwise_equal(y[b : b + 1, t : t + 1], got, f"y of token {t}")
    assert_bitwise_equal(inputs["states"], steps["states"], "slots")
