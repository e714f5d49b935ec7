"""Residual addition or gate, and normalisation. The rest is in ``test_window_contract.py``."""

import pytest
import torch
from cases import NORM

from speculative_mamba.ops import rms_norm
from speculative_mamba.testing.tolerance import assert_bitwise_equal


def test_one_addition_rounds_in_one_way(backend: str) -> None:
    arguments = NORM.make()
    residual, expected = (rms_norm(**arguments, backend=kind)[1] for kind in (backend, "reference"))
    assert_bitwise_equal(residual, expected, "residual")


def test_inputs_are_not_modified_nor_returned(backend: str) -> None:
    for change in ({}, {"residual": False}, NORM.GATED):
        inputs = NORM.make(change)
        before = {k: v.clone() if isinstance(v, torch.Tensor) else None for k, v in inputs.items()}
        for out in rms_norm(**inputs, backend=backend):
            out.fill_(7)
        for name, snapshot in before.items():
            if snapshot is not None:
                assert_bitwise_equal(inputs[name], snapshot, name)


def test_eps_is_inside_the_root(backend: str) -> None:
    x = torch.full((1, 33), 3.0)
    y, _ = rms_norm(x, torch.ones(33), eps=7.0, backend=backend)
    torch.testing.assert_close(y, torch.full((1, 33), 0.75))
    y, _ = rms_norm(torch.zeros(1, 33), torch.ones(33), backend=backend)
    assert_bitwise_equal(y, torch.zeros(1, 33), "zero stays zero")


def test_the_gate_comes_before_the_norm(backend: str) -> None:
    """So its scale cancels, and a gate that is the same for all features of a row changes nothing."""
    inputs = NORM.make({"contiguous": True, "residual": False})
    y, value = rms_norm(inputs["x"], inputs["weight"], gate=torch.full((5, 77), 20.0), eps=0.0, backend=backend)
    torch.testing.assert_close(value, 20 * inputs["x"])
    torch.testing.assert_close(y, rms_norm(inputs["x"], inputs["weight"], eps=0.0, backend=backend)[0])


@pytest.mark.parametrize("groups", [1, 7, 11, 77])
@pytest.mark.parametrize("change", [{}, NORM.GATED], ids=["residual", "gate"])
def test_every_group_is_normalised_by_itself(change: dict, groups: int, backend: str) -> None:
    inputs, size = NORM.make({**change, "groups": groups}), 77 // groups
    y, value = rms_norm(**inputs, backend=backend)
    for first in range(0, 77, size):
        part = {
            k: v[..., first : first + size].clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }
        y_part, value_part = rms_norm(**{**part, "groups": 1}, backend=backend)
        if backend == "cpu":  # PyTorch rounds a mean by where its values lie
            assert_bitwise_equal(y[:, first : first + size], y_part, f"y from {first} on")
            assert_bitwise_equal(value[:, first : first + size], value_part, f"value from {first} on")
        torch.testing.assert_close(y[:, first : first + size], y_part)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    inputs = NORM.make(NORM.GATED)
    for match, wrong in {
        "gate and residual cannot": {"residual": torch.zeros(5, 77)},
        r"gate must have shape \(5, 77\)": {"gate": torch.zeros(5, 78)},
        "gate must be torch.float32": {"gate": torch.zeros(5, 77).double()},
        "gate must be contiguous": {"gate": torch.zeros(77, 5).T},
        "groups must divide the 77 features, got 0": {"groups": 0},
        "groups must divide the 77 features, got 2": {"groups": 2},
        "groups must divide the 77 features, got -7": {"groups": -7},
    }.items():
        with pytest.raises(ValueError, match=match) as caught:
            rms_norm(**{**inputs, **wrong}, backend=backend)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x", "residual", "gate", "weight"])
def test_nan_reaches_exactly_what_depends_on_it(name: str, backend: str) -> None:
    inputs = NORM.make(NORM.GATED if name == "gate" else {})
    expected = torch.zeros(5, 77, dtype=torch.bool)
    if name == "weight":
        inputs["weight"][76] = torch.nan
        expected[:, 76] = True
    else:
        inputs[name][2, 76] = torch.nan
        expected[2] = True
    y, residual = rms_norm(**inputs, backend=backend)
    assert_bitwise_equal(y.isnan(), expected, "NaN in y")
    assert int(residual.isnan().sum()) == (name != "weight")
