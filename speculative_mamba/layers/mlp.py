"""An MLP, gated (Shazeer 2020, arXiv 2002.05202) or not."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import mlp_activation
from ..ops.block_weight import BlockWeight
from .cache import CacheSizes, Window
from .model_ops import skinny_linear


@dataclass(frozen=True)
class Mlp:
    """gate_proj (I, d), or None: not gated; up_proj (I, d), down_proj (d, I); their biases float32 or None. activation:
    of ``ops.mlp_activation``. gate_multiplier: of gate_proj's sums. It carries nothing between tokens."""

    gate_proj: torch.Tensor | BlockWeight | None
    up_proj: torch.Tensor | BlockWeight
    down_proj: torch.Tensor | BlockWeight
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    activation: str = "silu"
    gate_multiplier: float = 1.0
    backend: str = "auto"

    stateful: ClassVar[bool] = False

    def new_cache(self, sizes: CacheSizes) -> None:
        return None

    def __call__(self, hidden: torch.Tensor, batch: int, cache: None, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations."""
        up = skinny_linear(hidden, self.up_proj, self.up_bias, backend=self.backend)
        factors = (up,)
        if self.gate_proj is not None:
            gate = skinny_linear(
                hidden, self.gate_proj, self.gate_bias, y_scale=self.gate_multiplier, backend=self.backend
            )
            factors = gate, up
        y = mlp_activation(*factors, activation=self.activation, backend=self.backend)
        return skinny_linear(y, self.down_proj, self.down_bias, backend=self.backend)
