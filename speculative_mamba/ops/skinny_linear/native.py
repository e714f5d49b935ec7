"""Binding to csrc/cpu/skinny_linear.cpp."""

import torch

from ..backend import DTYPE_CODE, extension
from ..recording import new_result


def skinny_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows, in_features = x.shape
    out_features = weight.shape[0]
    y = new_result(rows, out_features)
    extension()[0].skinny_linear(
        rows, in_features, out_features, x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        DTYPE_CODE[weight.dtype], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
