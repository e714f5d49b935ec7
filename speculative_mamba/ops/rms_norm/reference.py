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
    value = x.clone(memory_format=torch.contiguous_format) if residual is None else x + residual
    if gate is not None:
        for m in range(len(x)):  # PyTorch rounds SiLU by where a value lies in its tensor
            value[m] *= F.silu(gate[m])
    parts = value.view(len(x), groups, x.shape[1] // groups)
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return (parts * scale).flatten(1) * weight.to(x.dtype), value
