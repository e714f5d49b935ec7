"""The specification in PyTorch. Row by row, because a matrix product may round by the number of its rows."""

import torch
import torch.nn.functional as F

from ..int8 import Int8Weight


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if x.dtype in (torch.bfloat16, torch.float16):
        return skinny_linear(x.float(), weight, bias).to(out_dtype or x.dtype)
    if bias is not None:
        return skinny_linear(x, weight) + bias.to(x.dtype)
    if isinstance(weight, Int8Weight):
        return skinny_linear(x, weight.values) * weight.scale.to(x.dtype)
    weight = weight.to(x.dtype)
    return torch.stack([F.linear(row, weight) for row in x]) if len(x) else x.new_empty(0, weight.shape[0])
