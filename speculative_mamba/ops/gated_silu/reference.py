"""The specification in PyTorch. Row by row, because PyTorch rounds SiLU by where a value lies in its tensor."""

import torch
import torch.nn.functional as F

from ..wide import is_narrow, widened
from . import GatedSiluArgs


def gated_silu(args: GatedSiluArgs) -> torch.Tensor:
    gate = args.gate
    if is_narrow(gate):
        return gated_silu(widened(args, "gate", "up")).to(gate.dtype)
    rows = [F.silu(g.contiguous()) * u for g, u in zip(gate, args.up, strict=True)]
    return torch.stack(rows) if rows else torch.empty_like(gate)
