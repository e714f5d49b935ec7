"""Rounding a weight to int8, and what may stand for one."""

import dataclasses

import pytest
import torch

from speculative_mamba.ops import causal_conv1d_verify, rms_norm, skinny_linear
from speculative_mamba.ops.int8 import Int8Weight, quantised
from speculative_mamba.ops.rms_norm import RmsNormArgs, native


def weights() -> torch.Tensor:
    """(1203, 2001): more than one chunk; rows from subnormal to huge, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1203, 2001, generator=generator) * torch.logspace(-42, 36, 1203)[:, None]
    weight[17] = 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_no_weight_moves_by_more_than_half_a_scale(dtype: torch.dtype) -> None:
    weight = weights()
    weight = (weight.clamp(-6e4, 6e4) if dtype is torch.float16 else weight).to(dtype)
    q = quantised(weight)
    assert q.values.dtype == torch.int8 and q.scale.dtype == torch.float32
    assert q.shape == weight.shape and q.scale.shape == (1203,)
    assert q.values.min() >= -127 and q.values.max() == 127
    scale = q.scale.double()[:, None]
    moved = (weight.double() - scale * q.values).abs() / scale
    # The quotient that is rounded is itself right to 2⁻²⁴ of at most 127.
    assert 0.499 < moved.max() <= 0.5 + 127 * 2**-23


def test_the_scale_is_the_largest_weight_over_127() -> None:
    weight = weights()
    q = quantised(weight)
    largest = weight.abs().amax(1)
    normal = largest / 127 >= torch.finfo(torch.float32).tiny
    assert torch.equal(q.scale[normal], (largest / 127)[normal])
    assert (q.values.abs().amax(1) == 127)[normal].all()
    assert (q.scale[~normal] == torch.finfo(torch.float32).tiny).all() and not normal[17]
    assert (q.values[17] == 0).all()


def test_halves_are_rounded_to_even() -> None:
    """Catches: truncation instead of rounding."""
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.0]])
    assert quantised(weight).values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -127]]


def test_rows_do_not_depend_on_each_other_or_on_strides() -> None:
    weight = weights()
    whole, turned = quantised(weight), quantised(weight.t().contiguous().t())
    for row in (0, 1, 524, 1202):
        assert torch.equal(quantised(weight[row : row + 1]).values[0], whole.values[row])
    assert torch.equal(turned.values, whole.values) and torch.equal(turned.scale, whole.scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weight = weights()
    weight[1202, 2000] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantised(weight)


def test_rows_are_looked_up_with_their_scale() -> None:
    q = quantised(weights())
    ids = torch.tensor([5, 1202, 5, 17])
    assert torch.equal(q.rows(ids), torch.stack([q.values[i].float() * q.scale[i] for i in ids]))


def test_a_weight_is_what_it_holds() -> None:
    weight = Int8Weight(torch.ones(7, 5, dtype=torch.int8), torch.ones(7))
    assert (weight.shape, weight.dtype, weight.device) == ((7, 5), torch.int8, torch.device("cpu"))
    assert weight.nbytes == 7 * 5 + 7 * 4


def refused(match: str, backend: str, **wrong: torch.Tensor) -> None:
    weight = dataclasses.replace(quantised(torch.randn(7, 33)), **wrong)
    with pytest.raises(ValueError, match=match) as caught:
        skinny_linear(torch.randn(3, 33), weight, backend=backend)
    assert "\n" not in str(caught.value)


def test_bad_values(backend: str) -> None:
    values = torch.zeros(7, 33, dtype=torch.int8)
    refused(r"weight\.values.*int8.*uint8", backend, values=values.to(torch.uint8))
    refused(r"weight\.values.*int8.*float32", backend, values=values.float())
    refused(r"weight\.values.*shape", backend, values=torch.zeros(7, 34, dtype=torch.int8))
    refused("matrices", backend, values=values[0])
    refused(r"weight\.values.*meta", backend, values=values.to("meta"))
    refused(r"weight\.values.*contiguous", backend, values=values.repeat_interleave(2, -1)[:, ::2])


def test_bad_scale(backend: str) -> None:
    refused(r"weight\.scale.*float32.*float64", backend, scale=torch.ones(7).double())
    refused(r"weight\.scale.*float32.*bfloat16", backend, scale=torch.ones(7).bfloat16())
    for shape in ((8,), (6,), (1,), (7, 1), ()):
        refused(r"weight\.scale.*shape", backend, scale=torch.ones(shape))
    refused(r"weight\.scale.*meta", backend, scale=torch.ones(7, device="meta"))
    refused(r"weight\.scale.*contiguous", backend, scale=torch.ones(14)[::2])


def test_int8_without_a_scale_is_no_weight(backend: str) -> None:
    values, start = torch.ones(7, 33, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"weight.*int8"):
        skinny_linear(torch.ones(3, 33), values, backend=backend)
    with pytest.raises(ValueError, match=r"weight.*int8"):
        rms_norm(torch.ones(3, 33), values[0], backend=backend)
    with pytest.raises(ValueError, match=r"weight.*int8"):
        causal_conv1d_verify(torch.ones(1, 1, 33), values[:4].t(), None, torch.zeros(1, 4, 33), start, backend=backend)


def test_the_kernels_of_other_ops_refuse_the_code_of_int8(cpu: str) -> None:
    args = RmsNormArgs(torch.ones(1, 33), torch.ones(33, dtype=torch.int8), None, None, 1, 1e-5, 1.0, False)
    with pytest.raises(ValueError, match="unknown dtype code 3"):
        native.rms_norm(args)
