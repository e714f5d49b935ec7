"""The Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import mlp_activation
from ..ops.block_weight import BlockWeight
from .cache import CacheSizes, MambaCache, Window, new_mamba_cache
from .materialize_state import MaterializeSsdState
from .model_ops import causal_conv1d_verify, rms_norm, skinny_linear, ssd_verify

# On two cores replay takes a half to a third of the time at any batch, and a fifth of the memory
# (python -m benchmarks.checkpoints).
REPLAY_IS_FASTER = True


@dataclass(frozen=True)
class Mamba2Mixer:
    """Weights of one mixer of H heads of P channels, and how they are shared: X heads of x, G and F groups of B and C.

    projections: one matrix (HP + XP + GN + FN + H, d) of z, x, B, C, dt, or three, of z, of x, B and C, and of dt; as
    many biases, each float32 or None, and multipliers of what comes before them. conv_weight (D, W) and conv_bias (D)
    or None for x, B and C side by side; A, dt_bias (H), D (H) or (H, P) float32; norm_weight (HP), or None: y is gated
    in the scan; gate_first: z gates what is normed, or else what was; out_proj (d, HP); out_bias or None. heads:
    (X, G, F). conv_heads: (X, G) after the convolution; where they are more than heads, x and B are repeated before it,
    and D counts the copies.
    """

    projections: tuple[torch.Tensor | BlockWeight, ...]
    biases: tuple[torch.Tensor | None, ...]
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    A: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor | None
    out_proj: torch.Tensor | BlockWeight
    head_dim: int
    state_size: int
    heads: tuple[int, int, int]
    conv_heads: tuple[int, int]
    out_bias: torch.Tensor | None = None
    multipliers: tuple[float, ...] = (1.0,)
    gate_first: bool = True
    norm_groups: int = 1
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)
    backend: str = "auto"

    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_weight", self.conv_weight.t().contiguous().t())

    def new_cache(self, sizes: CacheSizes) -> MambaCache:
        x, B = (self.conv_heads[0], self.head_dim), (self.conv_heads[1], self.state_size)
        state = (len(self.A), self.head_dim, self.state_size)
        materialize = MaterializeSsdState(self.A, x, B, self.backend)
        conv, inputs = tuple(self.conv_weight.shape), (x, (len(self.A),), B)
        return new_mamba_cache(sizes, sizes.replay(REPLAY_IS_FASTER), state, conv, inputs, self.A.device, materialize)

    def __call__(self, hidden: torch.Tensor, batch: int, cache: MambaCache, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations; writes the cache."""
        inner, N = len(self.A) * self.head_dim, self.state_size
        parts = [
            skinny_linear(hidden, weight, bias, y_scale=multiplier, backend=self.backend).unflatten(0, (batch, -1))
            for weight, bias, multiplier in zip(self.projections, self.biases, self.multipliers, strict=True)
        ]
        if len(parts) == 1:
            parts = parts[0].split([inner, parts[0].shape[-1] - inner - len(self.A), len(self.A)], -1)
        z, xBC, dt = parts
        x, B, C = self._convolved(xBC, cache, window)
        normed = self.norm_weight is not None
        y = ssd_verify(
            x.unflatten(-1, (-1, self.head_dim)), dt, self.A, B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N)),
            self.D, self.dt_bias, cache.states, window.start_slot, window.write_slot,
            z=None if normed else z.unflatten(-1, (-1, self.head_dim)), dt_limit=self.dt_limit,
            inputs=cache.inputs, left_padding=window.left_padding, final_state_only=window.final_state_only,
            backend=self.backend,
        )  # fmt: skip
        y = y.view(-1, inner)
        if normed:
            z = z.flatten(0, 1)
            y, _ = rms_norm(
                y, self.norm_weight, gate=z if self.gate_first else None, groups=self.norm_groups, eps=self.norm_eps,
                backend=self.backend,
            )  # fmt: skip
            if not self.gate_first:
                y = mlp_activation(z, y, backend=self.backend)
        return skinny_linear(y, self.out_proj, self.out_bias, backend=self.backend)

    def _convolved(self, xBC: torch.Tensor, cache: MambaCache, window: Window) -> tuple[torch.Tensor, ...]:
        """x, B and C after the convolution, each (B, T, channels)."""
        sizes, after = (self.head_dim, self.state_size, self.state_size), (*self.conv_heads, self.heads[2])
        widths = [heads * size for heads, size in zip(self.heads, sizes, strict=True)]
        if after == self.heads:
            return self._conv(xBC, 0, cache, window).split(widths, -1)
        parts, first = [], 0
        for part, before, heads, size in zip(xBC.split(widths, -1), self.heads, after, sizes, strict=True):
            parts.append(self._conv(part, first, cache, window, heads // before, size))
            first += heads * size
        return tuple(parts)

    def _conv(
        self, x: torch.Tensor, first: int, cache: MambaCache, window: Window, repeat: int = 1, block: int = 1
    ) -> torch.Tensor:
        """Convolves x as the channels of the weight from ``first`` on."""
        part = slice(first, first + x.shape[-1] * repeat)
        return causal_conv1d_verify(
            x, self.conv_weight[part], None if self.conv_bias is None else self.conv_bias[part],
            cache.window[..., part], window.start_slot, window.write_slot, repeat=repeat, block=block,
            left_padding=window.left_padding, final_state_only=window.final_state_only, backend=self.backend,
        )  # fmt: skip
