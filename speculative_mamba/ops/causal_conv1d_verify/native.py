"""Binding to csrc/cpu/causal_conv1d_verify.cpp and csrc/cuda/causal_conv1d_verify.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import CausalConv1dVerifyArgs


def causal_conv1d_verify(args: CausalConv1dVerifyArgs) -> torch.Tensor:
    x = args.x
    batch, tokens, _ = x.shape
    channels, width = args.weight.shape
    y = new_result(x, batch, tokens, channels)
    kernels, where = compiled(x)
    kernels.causal_conv1d_verify(
        args, where, activations=x.dtype, batch=batch, tokens=tokens, channels=channels, width=width, y=y
    )
    return y
