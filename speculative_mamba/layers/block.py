"""A pre-norm residual block."""

from dataclasses import dataclass

import torch

from .attention import Attention
from .cache import LayerCache, Window
from .mamba1 import Mamba1Mixer
from .mamba1_grouped import GroupedMamba1Mixer
from .mamba2 import Mamba2Mixer
from .mlp import GatedMlp
from .model_ops import rms_norm

Mixer = Mamba1Mixer | GroupedMamba1Mixer | Mamba2Mixer | Attention | GatedMlp


@dataclass(frozen=True)
class Block:
    """norm_weight (d), mixer."""

    norm_weight: torch.Tensor
    mixer: Mixer
    eps: float

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, batch: int, cache: LayerCache | None, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (B·T, d) and residual stream (B·T, d) or None → the same after this block."""
        normed, residual = rms_norm(hidden, self.norm_weight, residual, eps=self.eps, backend=self.mixer.backend)
        return self.mixer(normed, batch, cache, window), residual
