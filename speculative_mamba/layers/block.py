"""A pre-norm residual block."""

from dataclasses import dataclass

import torch

from ..ops import rms_norm
from .cache import MambaCache
from .mamba1 import Mamba1Mixer, Window


@dataclass(frozen=True)
class Block:
    """norm_weight (d), mixer."""

    norm_weight: torch.Tensor
    mixer: Mamba1Mixer
    eps: float

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, batch: int, cache: MambaCache, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (B·T, d) and residual stream (B·T, d) or None → the same after this block."""
        normed, residual = rms_norm(hidden, self.norm_weight, residual, eps=self.eps, backend=self.mixer.backend)
        return self.mixer(normed, batch, cache, window), residual
