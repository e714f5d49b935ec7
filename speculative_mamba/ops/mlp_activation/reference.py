"""The specification in PyTorch. Row by row, because PyTorch rounds SiLU by where a value lies in its tensor."""

import torch
import torch.nn.functional as F

from ..wide import is_narrow, widened
from . import ACTIVATIONS, MlpActivationArgs


def mlp_activation(args: MlpActivationArgs) -> torch.Tensor:
    gate, up = args.gate, args.up
    if is_narrow(gate):
        return mlp_activation(widened(args, "gate", "up")).to(gate.dtype)
    if ACTIVATIONS[args.activation] == "relu2":
        y = torch.relu(gate).square()
    else:
        rows = [F.silu(row.contiguous()) for row in gate]
        y = torch.stack(rows) if rows else torch.empty_like(gate)
    return y if up is None else y * up
