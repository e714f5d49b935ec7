"""Binding to csrc/cpu/skinny_linear.cpp and csrc/cuda/skinny_linear.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import SkinnyLinearArgs


def skinny_linear(args: SkinnyLinearArgs) -> torch.Tensor:
    x = args.x
    rows, in_features = x.shape
    out_features = args.weight.shape[0]
    y = new_result(x, rows, out_features, dtype=args.out_dtype)
    kernels, where = compiled(x)
    kernels.skinny_linear(
        args, where, activations=x.dtype, rows=rows, in_features=in_features, out_features=out_features, y=y,
    )  # fmt: skip
    return y
