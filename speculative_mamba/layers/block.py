"""A pre-norm residual block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .attention import Attention
from .cache import LayerCache, Window
from .experts import Experts
from .mamba1 import Mamba1Mixer
from .mamba1_grouped import GroupedMamba1Mixer
from .mamba2 import Mamba2Mixer
from .mlp import Mlp
from .model_ops import rms_norm
from .short_conv import ShortConv

Mixer = Mamba1Mixer | GroupedMamba1Mixer | Mamba2Mixer | ShortConv | Attention | Mlp | Experts
# Summands (B·T, d) that the residual stream lacks, each with the number that it counts times.
Summands = list[tuple[torch.Tensor, float]]


@dataclass(frozen=True)
class Block:
    """norm_weight (d); mixers, which read the same normed input; multipliers: how often the output of each counts."""

    norm_weight: torch.Tensor
    mixers: tuple[Mixer, ...]
    multipliers: tuple[float, ...]
    eps: float
    backend: str = "auto"

    def __call__(
        self,
        summands: Summands,
        residual: torch.Tensor | None,
        batch: int,
        caches: Iterator[LayerCache],
        window: Window,
    ) -> tuple[Summands, torch.Tensor]:
        """Summands and residual stream (B·T, d) or None → the same after this block. caches: of the next stateful
        mixers."""
        normed, residual = add_and_norm(summands, residual, self.norm_weight, self.eps, self.backend)
        outputs = [mixer(normed, batch, next(caches) if mixer.stateful else None, window) for mixer in self.mixers]
        return list(zip(outputs, self.multipliers, strict=True)), residual


def add_and_norm(
    summands: Summands, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed residual stream, and the stream itself, after the summands were added one by one."""
    for hidden, multiplier in summands:
        normed, residual = rms_norm(hidden, weight, residual, eps=eps, x_scale=multiplier, backend=backend)
    return normed, residual
