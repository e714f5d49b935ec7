"""The specification in PyTorch. Row by row, because PyTorch rounds SiLU by where a value lies in its tensor."""

import torch
import torch.nn.functional as F


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if gate.dtype in (torch.bfloat16, torch.float16):
        return gated_silu(gate.float(), up.float()).to(gate.dtype)
    rows = [F.silu(g.contiguous()) * u for g, u in zip(gate, up, strict=True)]
    return torch.stack(rows) if rows else torch.empty_like(gate)
