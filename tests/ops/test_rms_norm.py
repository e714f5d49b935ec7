"""Residual addition and normalisation."""

import pytest
import torch

from speculative_mamba.ops import rms_norm
from speculative_mamba.ops.rms_norm import reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

BASE = {"rows": 5, "features": 77, "dtype": torch.float32, "residual": True, "contiguous": False, "scale": 1.0}
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
]
table = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")


def make(change: dict | None = None) -> dict:
    """Arguments of the op; x lies in a wider matrix of NaN unless contiguous."""
    c = {**BASE, **(change or {})}
    rows, features, margin = c["rows"], c["features"], 0 if c["contiguous"] else 3
    g = torch.Generator().manual_seed(0)
    x = torch.full((rows, features + 2 * margin), torch.nan)[:, margin : margin + features]
    x[:] = torch.randn(rows, features, generator=g) * c["scale"]
    return {
        "x": x,
        "weight": (1 + 0.3 * torch.randn(features, generator=g)).to(c["dtype"]),
        "residual": torch.randn(rows, features, generator=g) * c["scale"] if c["residual"] else None,
    }


def row(inputs: dict, m: int) -> dict:
    residual = None if inputs["residual"] is None else inputs["residual"][m : m + 1]
    return {**inputs, "x": inputs["x"][m : m + 1], "residual": residual}


@table
def test_error_is_within_twice_that_of_pytorch(change: dict, cpu: str) -> None:
    inputs = make(change)
    residual = None if inputs["residual"] is None else inputs["residual"].double()
    y_double, residual_double = reference.rms_norm(inputs["x"].double(), inputs["weight"].double(), residual, 1e-5)
    y_single, residual_single = rms_norm(**inputs, backend="reference")
    y, residual_out = rms_norm(**inputs, backend=cpu)
    assert_accurate(y, y_single, y_double, what="y")
    assert_accurate(residual_out, residual_single, residual_double, what="residual")
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


def test_threads_do_not_change_a_bit(cpu: str) -> None:
    inputs = make({"rows": 61, "features": 2561})
    expected = rms_norm(**inputs, backend=cpu)
    for threads in (2, 4, 4, 3, 2, 4):
        torch.set_num_threads(threads)
        for actual, wanted in zip(rms_norm(**inputs, backend=cpu), expected, strict=True):
            assert_bitwise_equal(actual, wanted, f"{threads} threads")


def test_inputs_are_not_modified_nor_returned(backend: str) -> None:
    for change in ({}, {"residual": False}):
        inputs = make(change)
        before = {k: None if v is None else v.clone() for k, v in inputs.items()}
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


@pytest.mark.parametrize("name", ["x", "residual", "weight"])
def test_nan_reaches_exactly_what_depends_on_it(name: str, backend: str) -> None:
    inputs = make()
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
