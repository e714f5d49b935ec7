"""Binding to csrc/cpu/causal_conv1d_verify.cpp and csrc/cuda/causal_conv1d_verify.cu."""

import torch

from ..backend import DTYPE_CODE, address, compiled
from ..recording import new_result


def causal_conv1d_verify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int,
    null_columns: torch.Tensor | None,
    keep_last: bool,
    silu: bool,
    repeat: int,
    block: int,
) -> torch.Tensor:
    batch, tokens, _ = x.shape
    channels, width = weight.shape
    y = new_result(x, batch, tokens, channels)
    kernels, where = compiled(x)
    kernels.causal_conv1d(
        DTYPE_CODE[x.dtype], batch, tokens, channels, width, repeat, block, silu, x.data_ptr(), x.stride()[:2],
        weight.data_ptr(), weight.stride(), DTYPE_CODE[weight.dtype], address(bias), window.data_ptr(),
        window.stride()[:2], start_slot.data_ptr(), address(null_columns), write_slot, keep_last, y.data_ptr(), where,
    )  # fmt: skip
    return y
