"""The specification in PyTorch."""

import torch
import torch.nn.functional as F

from ..wide import is_narrow, widened
from . import RmsNormArgs


def rms_norm(args: RmsNormArgs) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual, gate = args.x, args.residual, args.gate
    if is_narrow(x):
        y, value = rms_norm(widened(args, "x", "gate"))
        return y.to(x.dtype), value
    scaled = x if args.x_scale == 1 else x * args.x_scale
    value = scaled.clone(memory_format=torch.contiguous_format) if residual is None else scaled + residual
    if gate is not None:
        for m in range(len(x)):  # PyTorch rounds SiLU by where a value lies in its tensor
            value[m] *= F.silu(gate[m])
    parts = value.view(len(x), args.groups, x.shape[1] // args.groups)
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + args.eps)
    return (parts * scale).flatten(1) * args.weight.to(x.dtype), value
