"""Binding to csrc/cpu/skinny_linear.cpp."""

import torch

from ..backend import DTYPE_CODE, address, extension
from ..int8 import Int8Weight
from ..recording import new_result


def skinny_linear(x: torch.Tensor, weight: torch.Tensor | Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows, in_features = x.shape
    out_features = weight.shape[0]
    values, scale = (weight.values, weight.scale) if isinstance(weight, Int8Weight) else (weight, None)
    y = new_result(rows, out_features)
    extension()[0].skinny_linear(
        rows, in_features, out_features, x.data_ptr(), x.stride(0), values.data_ptr(), values.stride(0),
        DTYPE_CODE[values.dtype], address(scale), address(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
