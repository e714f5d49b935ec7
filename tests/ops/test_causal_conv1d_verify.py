"""The convolution: what it computes, gates, channels that repeat. The rest is in ``test_window_contract.py``."""

import pytest
import torch
import torch.nn.functional as F
from cases import CONVOLUTION
from description import Row

from speculative_mamba.testing.tolerance import assert_bitwise_equal

rows = pytest.mark.ops(CONVOLUTION)


@rows
def test_reference_is_a_convolution(row: Row) -> None:
    arguments = row.make()
    whole = torch.cat([CONVOLUTION.slot(arguments)["history"], CONVOLUTION.repeated(arguments)], 1).double()
    bias = None if arguments["bias"] is None else arguments["bias"].double()
    weight = arguments["weight"].double()[:, None]
    expected = F.conv1d(whole.transpose(1, 2), weight, bias, groups=len(weight)).transpose(1, 2)
    expected = F.silu(expected) if arguments["silu"] else expected
    expected = expected if arguments["output_gate"] is None else expected * arguments["output_gate"]
    torch.testing.assert_close(CONVOLUTION.run(arguments, "reference"), expected.float())


@rows
def test_silu_is_applied_to_the_convolution(row: Row, backend: str) -> None:
    arguments = row.make()
    y = CONVOLUTION.run(CONVOLUTION.copy(arguments), backend, silu=True, output_gate=None)
    expected = F.silu(CONVOLUTION.run(arguments, backend, silu=False, output_gate=None))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)


REPEATED = [change for change in CONVOLUTION.changes if "block" in change]


@pytest.mark.parametrize("change", REPEATED, ids=str)
def test_repeated_channels_are_channels_like_any(change: dict, backend: str) -> None:
    """Also with left padding, from and to any slot. Catches: the channel of another block."""
    padding = torch.tensor([0, 5, 2], dtype=torch.int32)
    for other in ({}, {"left_padding": padding}, {"left_padding": padding, "write_slot": 2},
                  {"left_padding": padding, "final_state_only": True}):  # fmt: skip
        arguments = CONVOLUTION.make(change)
        plain = CONVOLUTION.copy(arguments)
        plain |= {"x": CONVOLUTION.repeated(arguments), "input_gate": None, "repeat": 1, "block": None}
        y = CONVOLUTION.run(arguments, backend, **other)
        assert y.isfinite().all() and y.is_contiguous()
        assert_bitwise_equal(y, CONVOLUTION.run(plain, backend, **other), f"y, {other}")
        assert_bitwise_equal(arguments["window"], plain["window"], f"window, {other}")


def test_gates_are_factors(backend: str) -> None:
    """Of what goes in and of what comes out, as slices of one projection, as models have them.

    Catches: a gate of another token, row or channel; one that is applied before SiLU.
    """
    for change in ({}, {"width": 8}, {"tokens": 17, "slots": 17}):
        arguments = CONVOLUTION.make(change)
        B, C, x = torch.cat([CONVOLUTION.make(change, seed)["x"] for seed in (1, 2, 3)], -1).chunk(3, -1)
        plain = CONVOLUTION.copy(arguments) | {"x": B * x}
        expected = CONVOLUTION.run(plain, backend) * C
        y = CONVOLUTION.run(arguments | {"x": x}, backend, input_gate=B, output_gate=C)
        assert_bitwise_equal(y, expected, f"y, {change}")
        assert_bitwise_equal(arguments["window"], plain["window"], f"window, {change}")


@pytest.mark.parametrize("name", ["input_gate", "output_gate"])
def test_gates_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    arguments = CONVOLUTION.make({"repeat": 3, "block": 11})
    before, shape = arguments["window"].clone(), (3, 5, 11 if name == "input_gate" else 33)
    for gate in (
        torch.ones(3, 5, 12),
        torch.ones(shape).double(),
        torch.ones(*shape, 2)[..., 0],
        torch.ones(shape[1:]),
    ):
        with pytest.raises(ValueError, match=f"^{name} must") as caught:
            CONVOLUTION.run(arguments, backend, **{name: gate})
        assert "\n" not in str(caught.value)
    assert_bitwise_equal(arguments["window"], before, "written before the error")


@pytest.mark.parametrize("change", [{}, {"repeat": 3, "block": 11}], ids=str)
def test_blocks_that_do_not_fit_are_refused(change: dict, backend: str) -> None:
    arguments = CONVOLUTION.make(change)
    before = arguments["window"].clone()
    for match, wrong in {
        "repeat needs a block, .* got repeat 3 and block None": {"repeat": 3, "block": None},
        "repeat needs a block, .* got repeat 0 and block 3": {"repeat": 0, "block": 3},
        "repeat needs a block, .* got repeat 1 and block 0": {"repeat": 1, "block": 0},
        r"block 2 times repeat \d does not divide the 33 channels": {"block": 2},
        "weight must be": {"repeat": 2, "block": 11},
    }.items():
        with pytest.raises(ValueError, match=match) as caught:
            CONVOLUTION.run(arguments, backend, **wrong)
        assert "\n" not in str(caught.value)
    assert_bitwise_equal(arguments["window"], before, "written before the error")
