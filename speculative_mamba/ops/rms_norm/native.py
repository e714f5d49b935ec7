"""Binding to csrc/cpu/rms_norm.cpp and csrc/cuda/rms_norm.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import RmsNormArgs


def rms_norm(args: RmsNormArgs) -> tuple[torch.Tensor, torch.Tensor]:
    x = args.x
    rows, features = x.shape
    y, residual_out = new_result(x, rows, features), new_result(x, rows, features, dtype=torch.float32)
    kernels, where = compiled(x)
    kernels.rms_norm(args, where, activations=x.dtype, rows=rows, features=features, y=y, residual_out=residual_out)
    return y, residual_out
