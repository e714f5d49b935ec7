"""Binding to csrc/cpu/ssd_verify.cpp and csrc/cuda/ssd_verify.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import SsdVerifyArgs


def ssd_verify(args: SsdVerifyArgs) -> torch.Tensor:
    x, kept = args.x, args.inputs
    batch, tokens, x_heads, head_size = x.shape
    heads, b_groups, state_size = args.dt.shape[2], *args.B.shape[2:]
    dt_min, dt_max = args.dt_limit
    y = new_result(x, batch, tokens, heads, head_size)
    kernels, where = compiled(x)
    kernels.ssd_verify(
        args, where, activations=x.dtype, batch=batch, tokens=tokens, heads=heads, head_size=head_size,
        state_size=state_size, x_heads=x_heads, b_groups=b_groups, c_groups=args.C.shape[2],
        d_per_channel=args.D.ndim == 2, dt_min=dt_min, dt_max=dt_max, input_slots=kept and kept.slots or 0,
        input_x=kept and kept.x, input_dt=kept and kept.dt, input_B=kept and kept.B, y=y,
    )  # fmt: skip
    return y
