"""The whole model over a whole text in float64, from scratch, sharing no code with the ops or the loop."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..layers.attention import Attention
from ..layers.experts import Experts
from ..layers.mamba1 import Mamba1Mixer
from ..layers.mamba1_grouped import GroupedMamba1Mixer
from ..layers.mamba2 import Mamba2Mixer
from ..layers.mlp import Mlp
from ..layers.short_conv import ShortConv
from ..models.language_model import MambaLM
from ..ops.block_weight import BlockWeight


def dense(weight: torch.Tensor | BlockWeight, dtype: torch.dtype) -> torch.Tensor:
    """The values of a weight as a tensor."""
    if isinstance(weight, BlockWeight):
        return weight.dequantized().to(dtype)
    return weight.to(dtype)


def full_forward(model: MambaLM, tokens: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits (L, V) after every token of one text, computed in ``dtype``."""
    c = model.config
    h = dense(model.embedding, dtype)[torch.tensor(tokens, dtype=torch.int64, device=model.device)]
    h = h * c.embedding_multiplier
    for block in model.blocks:
        normed = _norm(h, block.norm_weight, block.eps)
        for multiplier, mixer in zip(block.multipliers, block.mixers, strict=True):
            h = h + multiplier * _MIXERS[type(mixer)](mixer, normed)
    return _norm(h, model.norm_weight, c.eps) @ dense(model.head, dtype).T / c.logits_scaling


def greedy(model: MambaLM, prompt: list[int], count: int) -> list[int]:
    """prompt plus ``count`` tokens, every one from a forward pass over everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_forward(model, tokens)[-1].argmax()))
    return tokens


def _norm(h: torch.Tensor, weight: torch.Tensor | float, eps: float) -> torch.Tensor:
    weight = weight.to(h.dtype) if isinstance(weight, torch.Tensor) else weight
    return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _linear(x: torch.Tensor, weight: torch.Tensor | BlockWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x @ dense(weight, x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Causal depthwise convolution over a text x (L, D)."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.conv1d(F.pad(x.T, (weight.shape[1] - 1, 0))[None], weight[:, None], bias, groups=len(weight))[0].T


def _repeat(x: torch.Tensor, copies: int, block: int) -> torch.Tensor:
    """Blocks of the last dimension, each so many times in a row."""
    return x.unflatten(-1, (-1, block)).repeat_interleave(copies, -2).flatten(-2)


def _scan(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, m: object) -> torch.Tensor:
    """x, dt (L, D), B and C (L, N) or (L, D, N)."""
    A, D = m.A.to(x.dtype), m.D.to(x.dtype)
    dt = F.softplus(dt + m.dt_bias.to(x.dtype))
    state, y = torch.zeros_like(A), []
    for t in range(len(x)):
        state = torch.exp(dt[t, :, None] * A) * state + dt[t, :, None] * B[t] * x[t, :, None]
        y.append((state * C[t]).sum(-1) + D * x[t])
    return torch.stack(y)


def _mamba1(m: Mamba1Mixer, h: torch.Tensor) -> torch.Tensor:
    N, R = m.A.shape[1], m.dt_proj.shape[1]
    x, z = _linear(h, m.in_proj, m.in_bias).chunk(2, -1)
    x = F.silu(_conv(x, m.conv_weight, m.conv_bias))
    parts = _linear(x, m.x_proj).split([R, N, N], -1)
    if m.norms is not None:
        parts = [_norm(part, weight, m.norm_eps) for part, weight in zip(parts, m.norms, strict=True)]
    dt, B, C = parts
    y = _scan(x, _linear(dt, m.dt_proj), B[:, None], C[:, None], m)
    return _linear(y * F.silu(z), m.out_proj, m.out_bias)


def _grouped_mamba1(m: GroupedMamba1Mixer, h: torch.Tensor) -> torch.Tensor:
    D, N = m.A.shape
    copies = D // m.x_proj.shape[0]
    z, x, B, C, dt = (_linear(h, w) for w in (m.z_proj, m.x_proj, m.B_proj, m.C_proj, m.dt_down))
    x = F.silu(_conv(_repeat(x, copies, N), m.conv_weight, m.conv_bias))
    B, C = (part.unflatten(-1, (-1, N)).repeat_interleave(N, 1) for part in (_repeat(B, copies, N), C))
    y = _scan(x, _linear(dt, m.dt_proj, m.dt_bias), B, C, m)
    return _linear(y * F.silu(z), m.out_proj)


def _mamba2(m: Mamba2Mixer, h: torch.Tensor) -> torch.Tensor:
    H, P, N = len(m.A), m.head_dim, m.state_size
    X, G, C_groups = m.heads
    projections = zip(m.multipliers, m.projections, m.biases, strict=True)
    projected = torch.cat([_linear(multiplier * h, weight, bias) for multiplier, weight, bias in projections], -1)
    z, x, B, C, dt = projected.split([H * P, X * P, G * N, C_groups * N, H], -1)
    x, B = _repeat(x, m.conv_heads[0] // X, P), _repeat(B, m.conv_heads[1] // G, N)
    xBC = F.silu(_conv(torch.cat([x, B, C], -1), m.conv_weight, m.conv_bias))
    x, B, C = xBC.split([m.conv_heads[0] * P, m.conv_heads[1] * N, C_groups * N], -1)
    x, B, C = (part.unflatten(-1, (-1, size)) for part, size in ((x, P), (B, N), (C, N)))
    x, B, C = (part.repeat_interleave(H // part.shape[1], 1) for part in (x, B, C))
    dt = F.softplus(dt + m.dt_bias.to(h.dtype)).clamp(*m.dt_limit)
    state, y = torch.zeros(H, P, N, dtype=h.dtype, device=h.device), []
    for t in range(len(h)):
        state = torch.exp(dt[t] * m.A)[:, None, None] * state
        state = state + (dt[t, :, None] * x[t])[..., None] * B[t, :, None]
        y.append((state * C[t, :, None]).sum(-1) + m.D.to(h.dtype).view(H, -1) * x[t])
    y = torch.stack(y).flatten(1)
    if m.gate_first:
        y = y * F.silu(z)
    if m.norm_weight is not None:
        y = _norm(y.unflatten(-1, (m.norm_groups, -1)), 1.0, m.norm_eps).flatten(1) * m.norm_weight.to(h.dtype)
    if not m.gate_first:
        y = y * F.silu(z)
    return _linear(y, m.out_proj, m.out_bias)


def _short_conv(m: ShortConv, h: torch.Tensor) -> torch.Tensor:
    B, C, x = _linear(h, m.in_proj, m.in_bias).chunk(3, -1)
    return _linear(C * _conv(B * x, m.conv_weight, m.conv_bias), m.out_proj, m.out_bias)


def _attention(m: Attention, h: torch.Tensor) -> torch.Tensor:
    parts = [_linear(h, w, bias) for w, bias in zip(m.projections, m.biases, strict=True)]
    packed = torch.cat(parts, -1)
    if m.conv_weight is not None:
        packed = _conv(packed, m.conv_weight, m.conv_bias)
    heads = (m.n_heads, m.n_kv_heads, m.n_kv_heads)
    q, k, v = (part.unflatten(-1, (-1, m.head_dim)) for part in packed.split([n * m.head_dim for n in heads], -1))
    if m.q_norm is not None:
        q, k = (_norm(x, w.view(x.shape[1:]), m.norm_eps) for x, w in ((q, m.q_norm), (k, m.k_norm)))
    if m.inv_freq is not None:
        angles = torch.arange(len(h), dtype=h.dtype, device=h.device)[:, None, None] * m.inv_freq.to(h.dtype)
        q, k = _rotated(q, angles), _rotated(k, angles)
    k, v = (part.repeat_interleave(m.n_heads // m.n_kv_heads, 1) for part in (k, v))
    scores = torch.einsum("thp,shp->hts", q, k) * (m.head_dim**-0.5 if m.scale is None else m.scale)
    future = torch.ones(len(h), len(h), dtype=torch.bool, device=h.device).triu(1)
    y = torch.einsum("hts,shp->thp", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return _linear(y.flatten(1), m.out_proj, m.out_bias)


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = angles.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)


def _mlp(m: Mlp, h: torch.Tensor) -> torch.Tensor:
    act = {"silu": F.silu, "relu2": lambda x: torch.relu(x) ** 2}[m.activation]
    up = _linear(h, m.up_proj, m.up_bias)
    y = act(up) if m.gate_proj is None else act(_linear(m.gate_multiplier * h, m.gate_proj, m.gate_bias)) * up
    return _linear(y, m.down_proj, m.down_bias)


def _experts(m: Experts, h: torch.Tensor) -> torch.Tensor:
    """Every token through every expert, which counts as much as the router says."""
    act = {"silu": F.silu, "relu2": lambda x: torch.relu(x) ** 2}[m.activation]
    logits = h @ m.router.to(h.dtype).T
    scores = logits.sigmoid() if m.score == "sigmoid" else logits.softmax(-1)
    choice = scores if m.router_bias is None else scores + m.router_bias.to(h.dtype)
    groups = choice.unflatten(-1, (m.groups, -1))
    if m.groups > 1:
        best = groups.topk(2, -1).values.sum(-1).topk(m.top_k_groups, -1).indices
        kept = torch.zeros_like(groups[..., 0]).scatter(-1, best, 1.0)
        choice = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
    weights = torch.zeros_like(scores).scatter(-1, choice.topk(m.top_k, -1).indices, 1.0) * scores
    if m.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + m.epsilon)
    y = torch.zeros_like(h)
    for expert in range(scores.shape[-1]):
        up, gate = (None if w is None else dense(w[expert], h.dtype) for w in (m.up_proj, m.gate_proj))
        inner = act(h @ up.T) if gate is None else act(h @ gate.T) * (h @ up.T)
        y = y + m.scale * weights[:, expert, None] * (inner @ dense(m.down_proj[expert], h.dtype).T)
    return y


_MIXERS: dict[type, Callable[..., torch.Tensor]] = {
    Mamba1Mixer: _mamba1,
    GroupedMamba1Mixer: _grouped_mamba1,
    Mamba2Mixer: _mamba2,
    ShortConv: _short_conv,
    Attention: _attention,
    Mlp: _mlp,
    Experts: _experts,
}
