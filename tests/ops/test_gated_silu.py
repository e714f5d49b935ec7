"""The gate of an MLP."""

import pytest
import torch
import torch.nn.functional as F

from speculative_mamba.ops import gated_silu
from speculative_mamba.ops.gated_silu import GatedSiluArgs, reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

BASE = {"rows": 5, "features": 77, "margin": 3, "scale": 1.0}
CHANGES = [
    {},
    {"rows": 1},
    {"rows": 64},
    {"features": 1},
    {"features": 15},
    {"features": 16},
    {"features": 33},
    {"features": 14336},
    {"margin": 0},
    {"scale": 30.0},
    {"scale": 1e-4},
]
table = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")


def make(change: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up side by side in a matrix of NaN with margins."""
    c = {**BASE, **(change or {})}
    rows, features, margin = c["rows"], c["features"], c["margin"]
    wide = torch.full((rows, 2 * features + 3 * margin), torch.nan)
    parts = wide[:, margin : margin + features], wide[:, 2 * margin + features : 2 * margin + 2 * features]
    for seed, part in enumerate(parts):
        part[:] = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) * c["scale"]
    return parts


@table
def test_error_is_within_twice_that_of_pytorch(change: dict, kernels: str) -> None:
    gate, up = make(change)
    exact = reference.gated_silu(GatedSiluArgs(gate.double(), up.double()))
    torch.testing.assert_close(exact, F.silu(gate.double()) * up.double())
    assert_accurate(gated_silu(gate, up, backend=kernels), gated_silu(gate, up, backend="reference"), exact)


@table
def test_a_row_alone_has_the_same_bits(change: dict, backend: str) -> None:
    gate, up = make(change)
    before = gate.clone(), up.clone()
    y = gated_silu(gate, up, backend=backend)
    assert y.is_contiguous() and not y.isnan().any()
    for m in range(len(y)):
        alone = gated_silu(gate[m : m + 1], up[m : m + 1], backend=backend)
        assert_bitwise_equal(y[m : m + 1], alone, f"row {m}")
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


def test_a_value_has_the_same_bits_wherever_it_lies(kernels: str) -> None:
    gate, up = (torch.full((3, 37), value) for value in (0.3, 1.7))
    y = gated_silu(gate, up, backend=kernels)
    assert_bitwise_equal(y, y[:1, :1].expand_as(y))


def test_instruction_sets_and_threads_agree(fused_isas: list[str], select_isa) -> None:
    gate, up = make({"rows": 40, "features": 1000})
    results = []
    for isa in fused_isas:
        select_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gated_silu(gate, up, backend="cpu"))
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


def test_nan_stays_in_its_place(backend: str) -> None:
    gate, up = (part.clone() for part in make())
    gate[2, 5] = up[4, 40] = torch.nan
    assert gated_silu(gate, up, backend=backend).isnan().nonzero().tolist() == [[2, 5], [4, 40]]


def test_no_rows(backend: str) -> None:
    assert gated_silu(torch.empty(0, 7), torch.empty(0, 7), backend=backend).shape == (0, 7)


@pytest.mark.parametrize(
    ("gate", "up", "name"),
    [
        (torch.zeros(4), torch.zeros(4), "gate"),
        (torch.zeros(2, 4), torch.zeros(2, 5), "up"),
        (torch.zeros(2, 4), torch.zeros(2, 4).double(), "up"),
        (torch.zeros(2, 4).double(), torch.zeros(2, 4), "gate"),
        (torch.zeros(2, 8)[:, ::2], torch.zeros(2, 4), "gate"),
        (torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), "up"),
    ],
    ids=["vector", "shape", "dtype", "gate's dtype", "stride", "device"],
)
def test_arguments_that_do_not_fit(gate: torch.Tensor, up: torch.Tensor, name: str, backend: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} "):
        gated_silu(gate, up, backend=backend)
