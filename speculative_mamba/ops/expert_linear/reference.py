"""The specification in PyTorch. Row by row, because a matrix product may round by the number of its rows."""

import torch
import torch.nn.functional as F

from ..block_weight import BlockWeight
from ..wide import is_narrow, widened
from . import ExpertLinearArgs


def expert_linear(args: ExpertLinearArgs) -> torch.Tensor:
    x, (tokens, top_k) = args.x, args.experts.shape
    if is_narrow(x):
        return expert_linear(widened(args, "x")).to(x.dtype)
    products = x.new_empty(tokens, top_k, args.weight.shape[1])
    for m, experts in enumerate(args.experts.tolist()):
        for j, expert in enumerate(experts):
            products[m, j] = F.linear(x[m, j if x.shape[1] > 1 else 0], _values(args.weight[expert]).to(x.dtype))
    if args.expert_weights is None:
        return products
    y = torch.zeros_like(products[:, :1])
    for j in range(top_k):
        y[:, 0] += args.expert_weights[:, j, None].to(x.dtype) * products[:, j]
    return y


def _values(matrix: torch.Tensor | BlockWeight) -> torch.Tensor:
    return matrix.dequantized() if isinstance(matrix, BlockWeight) else matrix
