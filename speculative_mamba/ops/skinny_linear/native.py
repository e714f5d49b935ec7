"""Binding to csrc/cpu/skinny_linear.cpp and csrc/cuda/skinny_linear.cu."""

import torch

from ..backend import compiled
from ..int8 import Int8Weight
from ..recording import new_result
from . import SkinnyLinearArgs


def skinny_linear(args: SkinnyLinearArgs) -> torch.Tensor:
    x, weight, scale = args.x, args.weight, None
    if isinstance(weight, Int8Weight):
        weight, scale = weight.values, weight.scale
    rows, in_features = x.shape
    out_features = weight.shape[0]
    y = new_result(x, rows, out_features, dtype=args.out_dtype)
    kernels, where = compiled(x)
    kernels.skinny_linear(
        args, where, activations=x.dtype, rows=rows, in_features=in_features, out_features=out_features, weight=weight,
        weight_scale=scale, y=y,
    )  # fmt: skip
    return y
