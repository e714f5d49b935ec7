"""The activation of an MLP, with a gate and without."""

import math

import pytest
import torch
import torch.nn.functional as F

from speculative_mamba.ops import mlp_activation
from speculative_mamba.ops.mlp_activation import ACTIVATIONS, MlpActivationArgs, reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

BASE = {"rows": 5, "features": 77, "margin": 3, "scale": 1.0, "activation": "silu", "gated": True}
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
    {"gated": False},
    {"activation": "relu2"},
    {"activation": "relu2", "gated": False},
    {"activation": "relu2", "gated": False, "features": 14336, "margin": 0},
    {"activation": "relu2", "scale": 1e4},
]
table = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")


def make(change: dict | None = None) -> tuple[tuple[torch.Tensor, torch.Tensor | None], str]:
    """gate and up side by side in a matrix of NaN with margins, or gate alone; the activation."""
    c = {**BASE, **(change or {})}
    rows, features, margin = c["rows"], c["features"], c["margin"]
    wide = torch.full((rows, 2 * features + 3 * margin), torch.nan)
    parts = wide[:, margin : margin + features], wide[:, 2 * margin + features : 2 * margin + 2 * features]
    for seed, part in enumerate(parts):
        part[:] = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) * c["scale"]
    return (parts[0], parts[1] if c["gated"] else None), c["activation"]


def specified(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    return reference.mlp_activation(MlpActivationArgs(gate, up, ACTIVATIONS.index(activation)))


@table
def test_error_is_within_twice_that_of_pytorch(change: dict, kernels: str) -> None:
    (gate, up), activation = make(change)
    wide = gate.double(), None if up is None else up.double()
    exact = specified(*wide, activation)
    act = {"silu": F.silu, "relu2": lambda x: F.relu(x) ** 2}[activation]
    torch.testing.assert_close(exact, act(wide[0]) * (1 if up is None else wide[1]))
    y = mlp_activation(gate, up, activation=activation, backend=kernels)
    assert_accurate(y, specified(gate, up, activation), exact)


@table
def test_a_row_alone_has_the_same_bits(change: dict, backend: str) -> None:
    parts, activation = make(change)
    before = [None if part is None else part.clone() for part in parts]
    y = mlp_activation(*parts, activation=activation, backend=backend)
    assert y.is_contiguous() and not y.isnan().any()
    for m in range(len(y)):
        row = [None if part is None else part[m : m + 1] for part in parts]
        alone = mlp_activation(*row, activation=activation, backend=backend)
        assert_bitwise_equal(y[m : m + 1], alone, f"row {m}")
    assert all(part is None or torch.equal(part, old) for part, old in zip(parts, before, strict=True))


def test_a_value_has_the_same_bits_wherever_it_lies(kernels: str) -> None:
    gate, up = (torch.full((3, 37), value) for value in (0.3, 1.7))
    y = mlp_activation(gate, up, backend=kernels)
    assert_bitwise_equal(y, y[:1, :1].expand_as(y))


def test_instruction_sets_and_threads_agree(fused_isas: list[str], select_isa) -> None:
    (gate, up), _ = make({"rows": 40, "features": 1000})
    results = []
    for isa in fused_isas:
        select_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mlp_activation(gate, up, backend="cpu"))
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_place(activation: str, backend: str) -> None:
    gate, up = (part.clone() for part in make()[0])
    gate[2, 5] = up[4, 40] = torch.nan
    assert mlp_activation(gate, up, activation=activation, backend=backend).isnan().nonzero().tolist() == [
        [2, 5],
        [4, 40],
    ]


def test_no_rows(backend: str) -> None:
    assert mlp_activation(torch.empty(0, 7), torch.empty(0, 7), backend=backend).shape == (0, 7)


def test_another_activation_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"^activation must be one of silu, relu2, got 'gelu'$"):
        mlp_activation(torch.zeros(1, 4), activation="gelu", backend=backend)


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
        mlp_activation(gate, up, backend=backend)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_silu_of_a_huge_negative_number_is_nothing(backend: str) -> None:
    gate = torch.tensor([[-89.0, -1e3, -1e30, -3e38]])
    y = mlp_activation(gate, torch.ones_like(gate), backend=backend)
    assert y.abs().max() < 1e-36
    at_infinity = mlp_activation(gate - math.inf, torch.ones_like(gate), backend=backend)
    assert at_infinity.isnan().all(), "as PyTorch: -inf / inf"
