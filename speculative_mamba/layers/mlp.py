"""A gated MLP (Shazeer 2020, arXiv 2002.05202)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import gated_silu
from ..ops.int8 import Int8Weight
from .cache import CacheSizes, Window
from .model_ops import skinny_linear


@dataclass(frozen=True)
class GatedMlp:
    """gate_proj, up_proj (I, d), down_proj (d, I); their biases float32 or None. It carries nothing between tokens."""

    gate_proj: torch.Tensor | Int8Weight
    up_proj: torch.Tensor | Int8Weight
    down_proj: torch.Tensor | Int8Weight
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    backend: str = "auto"

    stateful: ClassVar[bool] = False

    def new_cache(self, sizes: CacheSizes) -> None:
        return None

    def __call__(self, hidden: torch.Tensor, batch: int, cache: None, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations."""
        gate = skinny_linear(hidden, self.gate_proj, self.gate_bias, backend=self.backend)
        up = skinny_linear(hidden, self.up_proj, self.up_bias, backend=self.backend)
        return skinny_linear(
            gated_silu(gate, up, backend=self.backend), self.down_proj, self.down_bias, backend=self.backend
        )
