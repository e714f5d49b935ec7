"""The whole model over a whole text in float64, from scratch, sharing no code with the ops or the loop."""

import torch
import torch.nn.functional as F

from ..models.language_model import MambaLM
from ..ops.int8 import Int8Weight


def dense(weight: torch.Tensor | Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """The values of a weight as a tensor."""
    if isinstance(weight, Int8Weight):
        return weight.values.to(dtype) * weight.scale.to(dtype)[:, None]
    return weight.to(dtype)


def full_forward(model: MambaLM, tokens: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits (L, V) after every token of one text, computed in ``dtype``."""

    def norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return h / (h.pow(2).mean(-1, keepdim=True) + model.config.eps).sqrt() * weight.to(dtype)

    h = dense(model.embedding, dtype)[torch.tensor(tokens)]
    for block in model.blocks:
        m = block.mixer
        D, N = m.A.shape
        R = m.dt_proj.shape[1]
        x, z = (norm(h, block.norm_weight) @ dense(m.in_proj, dtype).T).chunk(2, -1)
        bias = None if m.conv_bias is None else m.conv_bias.to(dtype)
        weight = m.conv_weight.to(dtype)
        x = F.conv1d(F.pad(x.T, (weight.shape[1] - 1, 0))[None], weight[:, None], bias, groups=D)[0].T
        x = F.silu(x)
        dt, B, C = (x @ dense(m.x_proj, dtype).T).split([R, N, N], -1)
        dt = F.softplus(dt @ dense(m.dt_proj, dtype).T + m.dt_bias.to(dtype))
        state, y = torch.zeros(D, N, dtype=dtype), []
        for t in range(len(tokens)):
            state = torch.exp(dt[t, :, None] * m.A.to(dtype)) * state + dt[t, :, None] * B[t] * x[t, :, None]
            y.append(state @ C[t] + m.D.to(dtype) * x[t])
        h = h + (torch.stack(y) * F.silu(z)) @ dense(m.out_proj, dtype).T
    return norm(h, model.norm_weight) @ dense(model.head, dtype).T


def greedy(model: MambaLM, prompt: list[int], count: int) -> list[int]:
    """prompt plus ``count`` tokens, every one from a forward pass over everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_forward(model, tokens)[-1].argmax()))
    return tokens
