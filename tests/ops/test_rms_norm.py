"""Residual addition or gate, and normalisation."""

import pytest
import torch

from speculative_mamba.ops import rms_norm
from speculative_mamba.ops.rms_norm import RmsNormArgs, reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

BASE = {
    "rows": 5, "features": 77, "dtype": torch.float32, "residual": True, "gate": False, "groups": 1,
    "contiguous": False, "scale": 1.0, "x_scale": 1.0,
}  # fmt: skip
GATED = {"residual": False, "gate": True}
CHANGES = [
    {},
    {"rows": 1},
    {"rows": 64},
    {"features": 1},
    {"features": 15},
    {"features": 16},
    {"features": 33},
    {"features": 2560},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"residual": False},
    {"contiguous": True},
    {"scale": 1e4},
    {"scale": 1e-4},
    {"x_scale": 0.22},
    {"x_scale": 12.0, "residual": False},
    {"x_scale": -0.3, "features": 2560, "contiguous": True},
    {"groups": 7},
    {"groups": 77},
    GATED,
    {**GATED, "rows": 1},
    {**GATED, "features": 1},
    {**GATED, "features": 16},
    {**GATED, "contiguous": True},
    {**GATED, "dtype": torch.bfloat16},
    {**GATED, "scale": 1e4},
    {**GATED, "groups": 11},
    {**GATED, "x_scale": 0.22},
    {**GATED, "groups": 2, "features": 66},
    {**GATED, "groups": 8, "features": 5120, "dtype": torch.float16},
]
table = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")


def make(change: dict | None = None) -> dict:
    """Arguments of the op; x and gate lie in wider matrices of NaN unless contiguous."""
    c = {**BASE, **(change or {})}
    rows, features = c["rows"], c["features"]
    g = torch.Generator().manual_seed(0)

    def matrix(scale: float, margin: int) -> torch.Tensor:
        margin = 0 if c["contiguous"] else margin
        wide = torch.full((rows, features + 2 * margin), torch.nan)[:, margin : margin + features]
        return wide.copy_(torch.randn(rows, features, generator=g) * scale)

    return {
        "x": matrix(c["scale"], 3),
        "weight": (1 + 0.3 * torch.randn(features, generator=g)).to(c["dtype"]),
        "residual": torch.randn(rows, features, generator=g) * c["scale"] if c["residual"] else None,
        "gate": matrix(2, 5) if c["gate"] else None,
        "groups": c["groups"],
        "x_scale": c["x_scale"],
    }


def row(inputs: dict, m: int) -> dict:
    return {k: v[m : m + 1] if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in inputs.items()}


@table
def test_error_is_within_twice_that_of_pytorch(change: dict, kernels: str) -> None:
    inputs = make(change)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    y_double, residual_double = reference.rms_norm(RmsNormArgs(**double, eps=1e-5, constant_weights=False))
    y_single, residual_single = rms_norm(**inputs, backend="reference")
    y, residual_out = rms_norm(**inputs, backend=kernels)
    assert_accurate(y, y_single, y_double, what="y")
    assert_accurate(residual_out, residual_single, residual_double, what="residual")
    if inputs["gate"] is None and inputs["x_scale"] == 1:
        assert_bitwise_equal(residual_out, residual_single, "one addition rounds in one way")


@table
def test_a_row_alone_has_the_same_bits(change: dict, backend: str) -> None:
    inputs = make(change)
    y, residual = rms_norm(**inputs, backend=backend)
    assert y.is_contiguous() and residual.is_contiguous()
    for m in range(len(y)):
        y_alone, residual_alone = rms_norm(**row(inputs, m), backend=backend)
        assert_bitwise_equal(y[m : m + 1], y_alone, f"y of row {m}")
        assert_bitwise_equal(residual[m : m + 1], residual_alone, f"residual of row {m}")


@pytest.mark.parametrize("change", [{}, {**GATED, "groups": 13}], ids=["residual", "gate"])
def test_threads_do_not_change_a_bit(change: dict, cpu: str) -> None:
    inputs = make({"rows": 61, "features": 2561, **change})
    expected = rms_norm(**inputs, backend=cpu)
    for threads in (2, 4, 4, 3, 2, 4):
        torch.set_num_threads(threads)
        for actual, wanted in zip(rms_norm(**inputs, backend=cpu), expected, strict=True):
            assert_bitwise_equal(actual, wanted, f"{threads} threads")


def test_inputs_are_not_modified_nor_returned(backend: str) -> None:
    for change in ({}, {"residual": False}, GATED):
        inputs = make(change)
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
    inputs = make({"contiguous": True, "residual": False})
    y, value = rms_norm(inputs["x"], inputs["weight"], gate=torch.full((5, 77), 20.0), eps=0.0, backend=backend)
    torch.testing.assert_close(value, 20 * inputs["x"])
    torch.testing.assert_close(y, rms_norm(inputs["x"], inputs["weight"], eps=0.0, backend=backend)[0])


@pytest.mark.parametrize("groups", [1, 7, 11, 77])
@pytest.mark.parametrize("change", [{}, GATED], ids=["residual", "gate"])
def test_every_group_is_normalised_by_itself(change: dict, groups: int, backend: str) -> None:
    inputs, size = make({**change, "groups": groups}), 77 // groups
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
    inputs = make(GATED)
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
    inputs = make(GATED if name == "gate" else {})
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


def test_instruction_sets_with_fused_multiply_add_agree(fused_isas: list[str], select_isa: object) -> None:
    for change in CHANGES:
        inputs, results = make(change), []
        for isa in fused_isas:
            select_isa(isa)
            results.append(rms_norm(**inputs, backend="cpu"))
        for y, residual in results[1:]:
            assert_bitwise_equal(y, results[0][0], f"y, {change}")
            assert_bitwise_equal(residual, results[0][1], f"residual, {change}")
