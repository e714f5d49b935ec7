"""The specification in PyTorch. Row by row, because a matrix product may round by the number of its rows."""

import torch
import torch.nn.functional as F

from ..block_weight import BlockWeight
from ..wide import is_narrow, widened
from . import SkinnyLinearArgs


def skinny_linear(args: SkinnyLinearArgs) -> torch.Tensor:
    x, weight = args.x, args.weight
    if is_narrow(x):
        return skinny_linear(widened(args, "x")).to(args.out_dtype)
    values = (weight.dequantized() if isinstance(weight, BlockWeight) else weight).to(x.dtype)
    y = torch.stack([F.linear(row, values) for row in x]) if len(x) else x.new_empty(0, weight.shape[0])
    if args.y_scale != 1:
        y = y * args.y_scale
    return y if args.bias is None else y + args.bias.to(x.dtype)
