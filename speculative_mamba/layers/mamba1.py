"""The Mamba-1 mixer (Gu and Dao 2023, arXiv 2312.00752)."""

from dataclasses import dataclass

import torch

from ..ops import causal_conv1d_verify, selective_scan_verify, skinny_linear
from ..ops.int8 import Int8Weight
from .cache import MambaCache


@dataclass
class Window:
    """Where a call starts and what it writes: the arguments that all layers of one call share.

    start_slot (B) int32, write_slot, null_columns (B) int32 or None, keep_last: see ``selective_scan_verify``.
    """

    start_slot: torch.Tensor
    write_slot: int = 0
    null_columns: torch.Tensor | None = None
    keep_last: bool = False


@dataclass(frozen=True)
class Mamba1Mixer:
    """Weights of one mixer; R is the rank of dt. A, D and dt_bias are float32, whatever the other weights are;
    only the four ``*_proj`` may be int8.

    in_proj (2D, d), conv_weight (D, W), conv_bias (D) or None, x_proj (R+2N, D), dt_proj (D, R), dt_bias (D), A (D, N),
    D (D), out_proj (d, D); in_bias (2D) and out_bias (d) or None.
    """

    in_proj: torch.Tensor | Int8Weight
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    x_proj: torch.Tensor | Int8Weight
    dt_proj: torch.Tensor | Int8Weight
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    out_proj: torch.Tensor | Int8Weight
    in_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        # Stored with the channels of a tap side by side, which is how the kernel reads them.
        object.__setattr__(self, "conv_weight", self.conv_weight.t().contiguous().t())

    def __call__(self, hidden: torch.Tensor, batch: int, cache: MambaCache, window: Window) -> torch.Tensor:
        """hidden (B·T, d) float32 → (B·T, d) float32; writes the cache."""
        channels, state_size = self.A.shape
        rank = self.dt_proj.shape[1]
        xz = skinny_linear(hidden, self.in_proj, backend=self.backend)
        if self.in_bias is not None:
            xz += self.in_bias
        xz = xz.view(batch, -1, 2 * channels)
        x, z = xz[..., :channels], xz[..., channels:]
        x = causal_conv1d_verify(
            x, self.conv_weight, self.conv_bias, cache.window, window.start_slot, window.write_slot,
            null_columns=window.null_columns, keep_last=window.keep_last, backend=self.backend,
        )  # fmt: skip
        projected = skinny_linear(x.view(-1, channels), self.x_proj, backend=self.backend)
        dt = skinny_linear(projected[:, :rank], self.dt_proj, backend=self.backend)
        BC = projected.view(batch, -1, rank + 2 * state_size)
        B, C = BC[..., rank : rank + state_size], BC[..., rank + state_size :]
        y = selective_scan_verify(
            x, dt.view_as(x), self.A, B, C, self.D, z, self.dt_bias, cache.states, window.start_slot,
            window.write_slot, null_columns=window.null_columns, keep_last=window.keep_last, backend=self.backend,
        )  # fmt: skip
        out = skinny_linear(y.view(-1, channels), self.out_proj, backend=self.backend)
        return out if self.out_bias is None else out.add_(self.out_bias)
