"""A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): each token goes through a few of many MLPs."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import expert_linear, mlp_activation, select_experts
from ..ops.expert_weight import ExpertWeight
from .cache import CacheSizes, Window
from .model_ops import skinny_linear


@dataclass(frozen=True)
class Experts:
    """E experts of which each token takes top_k.

    router (E, d); router_bias (E) float32 or None; gate_proj E × (I, d), or None: not gated; up_proj E × (I, d),
    down_proj E × (d, I); activation: of ``ops.mlp_activation``; the rest is of ``ops.select_experts``. It carries
    nothing between tokens.
    """

    router: torch.Tensor
    gate_proj: ExpertWeight | None
    up_proj: ExpertWeight
    down_proj: ExpertWeight
    top_k: int
    router_bias: torch.Tensor | None = None
    score: str = "softmax"
    groups: int = 1
    top_k_groups: int = 1
    normalize: bool = True
    epsilon: float = 0.0
    scale: float = 1.0
    activation: str = "silu"
    backend: str = "auto"

    stateful: ClassVar[bool] = False

    @property
    def unread_bytes(self) -> int:
        """Of the experts that one token does not choose."""
        matrices = (self.gate_proj, self.up_proj, self.down_proj)
        count = len(self.up_proj.matrices)
        return sum(weight.nbytes for weight in matrices if weight is not None) // count * (count - self.top_k)

    def new_cache(self, sizes: CacheSizes) -> None:
        return None

    def __call__(self, hidden: torch.Tensor, batch: int, cache: None, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations."""
        logits = skinny_linear(hidden, self.router, out_dtype=torch.float32, backend=self.backend)
        weights, experts = select_experts(
            logits, self.router_bias, top_k=self.top_k, score=self.score, groups=self.groups,
            top_k_groups=self.top_k_groups, normalize=self.normalize, epsilon=self.epsilon, scale=self.scale,
            backend=self.backend,
        )  # fmt: skip
        inputs = (self.up_proj,) if self.gate_proj is None else (self.gate_proj, self.up_proj)
        factors = (expert_linear(hidden[:, None], experts, None, w, backend=self.backend).flatten(0, 1) for w in inputs)
        y = mlp_activation(*factors, activation=self.activation, backend=self.backend).unflatten(0, experts.shape)
        return expert_linear(y, experts, weights, self.down_proj, backend=self.backend)[:, 0]
