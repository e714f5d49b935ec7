"""Infinities and values near them: what PyTorch makes not finite, no kernel makes a number."""

import copy
import math

import pytest
import torch
from cases import CASES, Random, call

from speculative_mamba.ops import mlp_activation
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "skinny_linear"  # has every kind of kernel


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", CASES)
def test_finite_where_the_reference_is(name: str, value: float, backend: str) -> None:
    """One element of one argument is infinite: results are finite where the reference's are."""
    window, cache, rest = CASES[name](Random(torch.float32))
    if name == "ssd_verify":
        rest["dt_limit"] = (0.01, 0.1)
    arguments = (window | cache | rest).items()
    for argument in [key for key, tensor in arguments if torch.is_tensor(tensor) and tensor.is_floating_point()]:
        outcomes = []
        for kind in ("reference", backend):
            parts = copy.deepcopy([window, cache, rest])
            tensor = next(part[argument] for part in parts if argument in part)
            tensor[(0,) * tensor.ndim] = value
            outcomes.append(
                [call(name, *parts, kind).isfinite(), *(written.isfinite() for written in parts[1].values())]
            )
        for actual, expected in zip(*outcomes[::-1], strict=True):
            assert_bitwise_equal(actual, expected, f"what is finite with {argument} {value}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_silu_of_a_huge_negative_number_is_nothing(backend: str) -> None:
    gate = torch.tensor([[-89.0, -1e3, -1e30, -3e38]])
    y = mlp_activation(gate, torch.ones_like(gate), backend=backend)
    assert y.abs().max() < 1e-36
    assert mlp_activation(gate - math.inf, torch.ones_like(gate), backend=backend).isnan().all(), (
        "as PyTorch: -inf / inf"
    )
