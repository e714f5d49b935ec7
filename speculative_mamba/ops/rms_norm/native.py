"""Binding to csrc/cpu/rms_norm.cpp and csrc/cuda/rms_norm.cu."""

import torch

from ..backend import DTYPE_CODE, address, compiled
from ..recording import new_result


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, features = x.shape
    y, residual_out = new_result(x, rows, features), new_result(x, rows, features, dtype=torch.float32)
    kernels, where = compiled(x)
    kernels.rms_norm(
        DTYPE_CODE[x.dtype], rows, features, groups, x.data_ptr(), x.stride(0), address(residual), address(gate),
        0 if gate is None else gate.stride(0), weight.data_ptr(), DTYPE_CODE[weight.dtype], eps,
        residual_out.data_ptr(), y.data_ptr(), where,
    )  # fmt: skip
    return y, residual_out
