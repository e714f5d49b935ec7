"""Grouped-query attention with a rotary embedding (Su et al. 2021, arXiv 2104.09864) over a cache that can go back."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import attention_verify
from ..ops.block_weight import BlockWeight
from .cache import CAPACITY_STEP, AttentionCache, CacheSizes, Window, new_conv_cache
from .model_ops import causal_conv1d_verify, rms_norm, skinny_linear


@dataclass(frozen=True)
class Attention:
    """Weights of one attention layer of H query heads and G heads of keys and values, P channels each.

    projections: q (HP, d), k and v (GP, d), or one matrix of all three; biases: as many, each float32 or None.
    conv_weight ((H+2G)P, W) and conv_bias: a convolution without activation over q, k and v side by side, or None;
    q_norm (HP) and k_norm (GP), or None: weights of an RMS norm of each head of q and k, before they are rotated;
    inv_freq (R) float32 or None: rotary frequencies; out_proj (d, HP), out_bias or None.
    """

    projections: tuple[torch.Tensor | BlockWeight, ...]
    biases: tuple[torch.Tensor | None, ...]
    out_proj: torch.Tensor | BlockWeight
    n_heads: int
    n_kv_heads: int
    head_dim: int
    inv_freq: torch.Tensor | None = None
    scale: float | None = None
    conv_weight: torch.Tensor | None = None
    conv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    norm_eps: float | None = None
    out_bias: torch.Tensor | None = None
    backend: str = "auto"

    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.conv_weight is not None:
            object.__setattr__(self, "conv_weight", self.conv_weight.t().contiguous().t())

    def new_cache(self, sizes: CacheSizes) -> AttentionCache:
        device = self.out_proj.device
        entries = (sizes.batch, self.n_kv_heads, CAPACITY_STEP, self.head_dim)
        keys, values = (torch.empty(entries, dtype=sizes.dtype, device=device) for _ in range(2))
        lengths, window = torch.zeros(sizes.batch, sizes.slots, dtype=torch.int32, device=device), None
        if self.conv_weight is not None:
            window = new_conv_cache(sizes, *self.conv_weight.shape, device).window
        return AttentionCache(keys, values, lengths, window)

    def __call__(self, hidden: torch.Tensor, batch: int, cache: AttentionCache, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations; writes the cache."""
        parts = [
            skinny_linear(hidden, weight, bias, backend=self.backend).unflatten(0, (batch, -1))
            for weight, bias in zip(self.projections, self.biases, strict=True)
        ]
        if self.conv_weight is not None:
            [packed] = parts
            parts = [
                causal_conv1d_verify(
                    packed, self.conv_weight, self.conv_bias, cache.window, window.start_slot, window.write_slot,
                    silu=False, left_padding=window.left_padding, final_state_only=window.final_state_only,
                    backend=self.backend,
                )
            ]  # fmt: skip
        if len(parts) == 1:
            heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
            parts = parts[0].split([count * self.head_dim for count in heads], -1)
        if self.q_norm is not None:
            parts = [self._normed(parts[0], self.q_norm), self._normed(parts[1], self.k_norm), parts[2]]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        y = attention_verify(
            q, k, v, cache.keys, cache.values, cache.lengths, window.start_slot, window.write_slot,
            inv_freq=self.inv_freq, scale=self.scale,
            left_padding=window.left_padding, final_state_only=window.final_state_only, backend=self.backend,
        )  # fmt: skip
        return skinny_linear(y.view(hidden.shape[0], -1), self.out_proj, self.out_bias, backend=self.backend)

    def _normed(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, T, heads side by side), each normalised by itself."""
        groups = len(weight) // self.head_dim
        y, _ = rms_norm(heads.flatten(0, 1), weight, groups=groups, eps=self.norm_eps, backend=self.backend)
        return y.view(heads.shape)
