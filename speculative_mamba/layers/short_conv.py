"""The gated short convolution of LFM2 (Liquid AI 2025, arXiv 2511.23404)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.block_weight import BlockWeight
from .cache import CacheSizes, ConvCache, Window, new_conv_cache
from .model_ops import causal_conv1d_verify, skinny_linear


@dataclass(frozen=True)
class ShortConv:
    """Weights of one mixer: y = out_proj(C · conv(B · x)), without activation or scan.

    in_proj (3D, d): B, C, x; conv_weight (D, W); out_proj (d, D); in_bias (3D), conv_bias (D) and out_bias (d) float32
    or None. A slot is the window alone, so that ``rollback`` makes no difference.
    """

    in_proj: torch.Tensor | BlockWeight
    conv_weight: torch.Tensor
    out_proj: torch.Tensor | BlockWeight
    in_bias: torch.Tensor | None = None
    conv_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    backend: str = "auto"

    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_weight", self.conv_weight.t().contiguous().t())

    def new_cache(self, sizes: CacheSizes) -> ConvCache:
        return new_conv_cache(sizes, *self.conv_weight.shape, self.conv_weight.device)

    def __call__(self, hidden: torch.Tensor, batch: int, cache: ConvCache, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations; writes the cache."""
        projected = skinny_linear(hidden, self.in_proj, self.in_bias, backend=self.backend)
        B, C, x = projected.unflatten(0, (batch, -1)).chunk(3, -1)
        y = causal_conv1d_verify(
            x, self.conv_weight, self.conv_bias, cache.window, window.start_slot, window.write_slot,
            input_gate=B, output_gate=C, silu=False, left_padding=window.left_padding,
            final_state_only=window.final_state_only, backend=self.backend,
        )  # fmt: skip
        return skinny_linear(y.flatten(0, 1), self.out_proj, self.out_bias, backend=self.backend)
