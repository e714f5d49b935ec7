"""The Mamba-2 recurrence: heads that share, skip and limits. The rest is in ``test_window_contract.py``."""

import math

import pytest
import torch
from cases import SSD

from speculative_mamba.testing.tolerance import assert_bitwise_equal


@pytest.mark.parametrize("name", ["x", "B", "C"])
def test_heads_that_share_are_heads_with_equal_values(name: str, backend: str) -> None:
    shared = SSD.make({"x_heads": 2})
    own = SSD.copy(shared)
    own[name] = own[name].repeat_interleave(6 // own[name].shape[2], 2)
    assert_bitwise_equal(SSD.run(shared, backend), SSD.run(own, backend), "y")
    assert_bitwise_equal(shared["states"], own["states"], "slots")


def test_skip_per_head_is_one_for_all_its_channels(backend: str) -> None:
    inputs = SSD.make()
    per_channel = SSD.copy(inputs) | {"D": inputs["D"][:, None].repeat(1, 21)}
    assert_bitwise_equal(SSD.run(inputs, backend), SSD.run(per_channel, backend), "y")


def test_limits_of_the_step(backend: str) -> None:
    """A step of ln 2 at A = -1 halves the state and adds ln 2 x B; steps of 0 change nothing."""
    inputs = SSD.make({"dt_limit": (math.log(2), math.log(2)), "tokens": 1, "x_heads": 6, "b_groups": 6, "gate": False})
    inputs["A"].fill_(-1)
    before = inputs["states"][:, 0].clone()
    SSD.run(inputs, backend)
    added = math.log(2) * inputs["x"][:, 0, ..., None] * inputs["B"][:, 0, :, None]
    torch.testing.assert_close(inputs["states"][:, 0], before / 2 + added)
    still = SSD.make({"dt_limit": (0.0, 0.0)})
    before = still["states"][:, :1].clone()
    SSD.run(still, backend)
    assert_bitwise_equal(still["states"][:, :5], before.expand(-1, 5, -1, -1, -1), "slots")


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
    inputs = SSD.make()
    before = inputs["states"].clone()
    with pytest.raises(ValueError, match=match) as caught:
        SSD.run(inputs, backend, **wrong)
    assert "\n" not in str(caught.value)
    assert_bitwise_equal(inputs["states"], before, "states")
