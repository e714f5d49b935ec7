"""Binding to csrc/cpu/skinny_linear.cpp and csrc/cuda/skinny_linear.cu."""

import torch

from ..backend import DTYPE_CODE, address, compiled
from ..int8 import Int8Weight
from ..recording import new_result


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor | Int8Weight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    rows, in_features = x.shape
    out_features = weight.shape[0]
    values, scale = (weight.values, weight.scale) if isinstance(weight, Int8Weight) else (weight, None)
    y = new_result(x, rows, out_features, dtype=out_dtype)
    kernels, where = compiled(x)
    kernels.skinny_linear(
        DTYPE_CODE[x.dtype], DTYPE_CODE[out_dtype], rows, in_features, out_features, x.data_ptr(), x.stride(0),
        values.data_ptr(), values.stride(0), DTYPE_CODE[values.dtype], address(scale), address(bias), y.data_ptr(),
        where,
    )  # fmt: skip
    return y
