"""The specification in PyTorch."""

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = x.clone() if residual is None else x + residual
    scale = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
    return residual * scale * weight.to(x.dtype), residual
