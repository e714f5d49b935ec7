"""The gate of an MLP. The rest is in ``test_window_contract.py``."""

import math

import pytest
import torch
import torch.nn.functional as F

from speculative_mamba.ops import gated_silu
from speculative_mamba.ops.gated_silu import GatedSiluArgs, reference
from speculative_mamba.testing.tolerance import assert_bitwise_equal


def test_the_reference_is_silu_of_the_gate_times_up() -> None:
    gate, up = torch.randn(5, 77).double(), torch.randn(5, 77).double()
    torch.testing.assert_close(reference.gated_silu(GatedSiluArgs(gate, up)), F.silu(gate) * up)


def test_a_value_has_the_same_bits_wherever_it_lies(kernels: str) -> None:
    gate, up = (torch.full((3, 37), value) for value in (0.3, 1.7))
    y = gated_silu(gate, up, backend=kernels)
    assert_bitwise_equal(y, y[:1, :1].expand_as(y))


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_silu_of_a_huge_negative_number_is_nothing(backend: str) -> None:
    gate = torch.tensor([[-89.0, -1e3, -1e30, -3e38]])
    y = gated_silu(gate, torch.ones_like(gate), backend=backend)
    assert y.abs().max() < 1e-36
    assert gated_silu(gate - math.inf, torch.ones_like(gate), backend=backend).isnan().all(), "as PyTorch: -inf / inf"
