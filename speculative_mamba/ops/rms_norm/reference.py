"""The specification in PyTorch."""

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dtype in (torch.bfloat16, torch.float16):
        y, value = rms_norm(x.float(), weight, residual, None if gate is None else gate.float(), groups, eps)
        return y.to(x.dtype), value
    value = x.clone(memory_format=torch.contiguous_format) if residual is None else x + residual
    if gate is not None:
        for m in range(len(x)):  # PyTorch rounds SiLU by where a value lies in its tensor
            value[m] *= F.silu(gate[m])
    parts = value.view(len(x), groups, x.shape[1] // groups)
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return (parts * scale).flatten(1) * weight.to(x.dtype), value
