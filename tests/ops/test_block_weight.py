"""Weights in GGUF's blocks: bit for bit what GGML makes and reads, and what may stand for one."""

import dataclasses

import numpy as np
import pytest
import torch

from speculative_mamba.ops import rms_norm, skinny_linear
from speculative_mamba.ops.block_formats import FORMATS
from speculative_mamba.ops.block_weight import BlockWeight, quantized
from speculative_mamba.ops.rms_norm import RmsNormArgs, native
from speculative_mamba.testing.blocks import random_blocks

OP = "skinny_linear"
QUANTIZED = ("q8_0", "q4_0")
formats = pytest.mark.parametrize("format", FORMATS)
quantizes = pytest.mark.parametrize("format", QUANTIZED)


def gguf_of(format: str) -> tuple:
    """The module that stands for GGML, and its number of the format."""
    quants = pytest.importorskip("gguf.quants")
    return quants, quants.GGMLQuantizationType[format.upper()]


def weights() -> torch.Tensor:
    """(1203, 320): more than one chunk, a part of a group; rows from what a half cannot hold up; one of zeros, one of
    weights that are equal but for their sign."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1203, 320, generator=generator) * torch.logspace(-12, 4, 1203)[:, None]
    weight[17] = 0
    weight[900] = weight[900].sign()
    return weight


@quantizes
def test_blocks_are_those_of_ggml(format: str) -> None:
    """Where a scale is 0 as a half, its integers count nothing: they are set apart."""
    quants, number = gguf_of(format)
    weight = weights()
    with np.errstate(all="ignore"):  # of gguf
        raw = torch.from_numpy(quants.quantize(weight.numpy(), number))
    size = FORMATS[format].block_bytes
    blocks = raw.view(len(raw), -1, size)
    has_scale = blocks[..., :2].contiguous().view(torch.float16) != 0
    assert not has_scale.all() and not has_scale[17].any()
    expected = BlockWeight.from_gguf(raw, format, 320).dequantized()
    actual = quantized(weight, format).dequantized()
    assert torch.equal(actual, expected)
    whole = has_scale.all(1)[:, 0]
    kept = BlockWeight.from_gguf(raw[whole], format, 320)
    assert torch.equal(quantized(weight[whole], format).data, kept.data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@quantizes
def test_any_dtype_and_strides(format: str, dtype: torch.dtype) -> None:
    weight = weights().clamp(-6e4, 6e4).to(dtype)
    expected = quantized(weight.float(), format).data
    assert torch.equal(quantized(weight, format).data, expected)
    assert torch.equal(quantized(weight.t().contiguous().t(), format).data, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@quantizes
def test_weights_that_no_half_can_scale_are_refused(format: str, value: float) -> None:
    weight = weights()
    weight[1202, 319] = value
    with pytest.raises(ValueError, match=f"NaN, infinite or too large .* cannot be {format}"):
        quantized(weight, format)


@formats
def test_values_are_those_of_ggml(format: str) -> None:
    """Of a part of a group too. Catches: a scale, a minimum, high bits of another feature."""
    quants, number = gguf_of(format)
    raw = random_blocks(37, 768, format)
    weight = BlockWeight.from_gguf(raw, format, 768)
    expected = torch.from_numpy(quants.dequantize(raw.numpy(), number))
    assert torch.equal(weight.dequantized(), expected)
    ids = torch.tensor([5, 36, 5, 17])
    assert torch.equal(weight.rows(ids), expected[ids])


@formats
def test_rows_that_are_made_zero(format: str) -> None:
    raw = random_blocks(37, 512, format)
    weight = BlockWeight.from_gguf(raw, format, 512)
    expected = weight.dequantized()
    weight.zero_rows(torch.tensor([3, 36]))
    expected[[3, 36]] = 0
    assert torch.equal(weight.dequantized(), expected)


@formats
def test_a_weight_is_what_it_holds(format: str) -> None:
    raw = random_blocks(40, 512, format)
    weight = BlockWeight.from_gguf(raw, format, 512)
    assert (weight.shape, weight.device, len(weight)) == ((40, 512), torch.device("cpu"), 40)
    assert str(weight.dtype) == f"gguf.{format}"
    assert weight.nbytes == weight.data.nbytes <= 1.04 * raw.nbytes * 48 / 40
    assert torch.equal(weight.to(torch.device("cpu")).data, weight.data)


def test_what_cannot_be_in_blocks() -> None:
    for call, match in (
        (lambda: quantized(torch.ones(3, 33), "q8_0"), "q8_0 has blocks of 32 features, so 33"),
        (lambda: quantized(torch.ones(3, 0), "q4_0"), "q4_0 has blocks of 32 features, so 0"),
        (lambda: quantized(torch.ones(3, 32), "q6_k"), "to q8_0 or q4_0, not to 'q6_k'"),
        (lambda: quantized(torch.ones(3, 32), "int8"), "to q8_0 or q4_0, not to 'int8'"),
        (lambda: BlockWeight.from_gguf(torch.zeros(3, 144, dtype=torch.uint8), "q4_k", 32), "blocks of 256 features"),
        (lambda: BlockWeight.from_gguf(torch.zeros(3, 34, dtype=torch.uint8), "q2_k", 32), "unknown format .*'q2_k'"),
        (lambda: BlockWeight.from_gguf(torch.zeros(3, 33, dtype=torch.uint8), "q8_0", 32), r"shape \(3, 34\)"),
        (lambda: BlockWeight.from_gguf(torch.zeros(3, 34), "q8_0", 32), "must be uint8"),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_bad_data(backend: str) -> None:
    weight = quantized(torch.randn(7, 64), "q8_0")
    for match, wrong in (
        (r"weight\.data.*uint8.*int8", {"data": weight.data.view(torch.int8)}),
        (r"weight\.data.*shape", {"data": weight.data[:, :-1]}),
        (r"weight\.data.*shape", {"format": "q4_0"}),
        (r"weight\.data.*shape", {"shape": torch.Size((17, 64))}),
        (r"weight must have shape \(7, 64\)", {"shape": torch.Size((7, 32))}),
        (r"unknown format of blocks 'q5_0'", {"format": "q5_0"}),
        (r"weight\.data.*meta", {"data": weight.data.to("meta")}),
        (r"weight\.data.*contiguous", {"data": weight.data.repeat_interleave(2, -1)[:, ::2]}),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            skinny_linear(torch.randn(3, 64), dataclasses.replace(weight, **wrong), backend=backend)
        assert "\n" not in str(caught.value)


def test_kernels_of_gpus_say_which_formats_they_lack(gpu_kernels: str) -> None:
    weight = BlockWeight.from_gguf(random_blocks(16, 256, "q4_k"), "q4_k", 256)
    with pytest.raises(ValueError, match=f"'{gpu_kernels}' has kernels for q8_0 and q4_0, not for q4_k; use cpu"):
        skinny_linear(torch.ones(1, 256), weight, backend=gpu_kernels)


def test_bytes_without_a_format_are_no_weight(backend: str) -> None:
    with pytest.raises(ValueError, match=r"weight.*uint8"):
        skinny_linear(torch.ones(3, 32), torch.ones(7, 32, dtype=torch.uint8), backend=backend)
    with pytest.raises(ValueError, match=r"weight.*int8"):
        rms_norm(torch.ones(3, 33), torch.ones(33, dtype=torch.int8), backend=backend)


def test_the_kernels_of_other_ops_refuse_the_code_of_blocks(cpu: str) -> None:
    args = RmsNormArgs(torch.ones(1, 32), quantized(torch.ones(1, 32), "q8_0"), None, None, 1, 1e-5, 1.0, False)
    with pytest.raises(ValueError, match="unknown dtype code 3"):
        native.rms_norm(args)
