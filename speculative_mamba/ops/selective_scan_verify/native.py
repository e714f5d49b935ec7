"""Binding to csrc/cpu/selective_scan_verify.cpp and csrc/cuda/selective_scan_verify.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import SelectiveScanVerifyArgs


def selective_scan_verify(args: SelectiveScanVerifyArgs) -> torch.Tensor:
    x, kept = args.x, args.inputs
    batch, tokens, channels = x.shape
    b_groups, c_groups = (tensor.shape[2] if tensor.ndim == 4 else 1 for tensor in (args.B, args.C))
    y = new_result(x, batch, tokens, channels)
    kernels, where = compiled(x)
    kernels.selective_scan_verify(
        args, where, activations=x.dtype, batch=batch, tokens=tokens, channels=channels, state_size=args.A.shape[1],
        b_groups=b_groups, c_groups=c_groups, input_slots=kept and kept.slots or 0, input_x=kept and kept.x,
        input_dt=kept and kept.dt, input_B=kept and kept.B, y=y,
    )  # fmt: skip
    return y
