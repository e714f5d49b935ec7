"""Binding to csrc/cpu/ssd_verify.cpp and csrc/cuda/ssd_verify.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from ..replay import input_fields
from . import SsdVerifyArgs


def ssd_verify(args: SsdVerifyArgs) -> torch.Tensor:
    x = args.x
    batch, tokens, x_heads, head_size = x.shape
    heads, b_groups, state_size = args.dt.shape[2], *args.B.shape[2:]
    dt_min, dt_max = args.dt_limit
    y = new_result(x, batch, tokens, heads, head_size)
    kernels, where = compiled(x)
    kernels.ssd_verify(
        args, where, activations=x.dtype, batch=batch, tokens=tokens, heads=heads, head_size=head_size,
        state_size=state_size, x_heads=x_heads, b_groups=b_groups, c_groups=args.C.shape[2],
        d_per_channel=args.D.ndim == 2, dt_min=dt_min, dt_max=dt_max, **input_fields(args.inputs), y=y,
    )  # fmt: skip
    return y
