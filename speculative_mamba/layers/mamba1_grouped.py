"""The Mamba-1 mixer with grouped heads of The Mamba in the Llama (Wang et al. 2024, arXiv 2408.15237, section 2)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.block_weight import BlockWeight
from .cache import CacheSizes, MambaCache, Window, new_mamba_cache
from .mamba1 import REPLAY_IS_FASTER
from .materialize_state import MaterializeScanState
from .model_ops import causal_conv1d_verify, selective_scan_verify, skinny_linear


@dataclass(frozen=True)
class GroupedMamba1Mixer:
    """Weights of one mixer made from an attention layer: unlike ``Mamba1Mixer``'s, B, C and dt come from its input.

    X channels of x and B, in heads of N, serve the D channels of z and C, as grouped keys and values serve queries.
    z_proj, C_proj (D, d); x_proj, B_proj (X, d); dt_down (R, d); dt_proj (D, R); conv_weight (D, W), conv_bias (D) or
    None; dt_bias (D), A (D, N), D (D) float32; out_proj (d, D).
    """

    z_proj: torch.Tensor | BlockWeight
    x_proj: torch.Tensor | BlockWeight
    B_proj: torch.Tensor | BlockWeight
    C_proj: torch.Tensor | BlockWeight
    dt_down: torch.Tensor | BlockWeight
    dt_proj: torch.Tensor | BlockWeight
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    out_proj: torch.Tensor | BlockWeight
    backend: str = "auto"

    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_weight", self.conv_weight.t().contiguous().t())

    @property
    def _groups(self) -> int:
        return self.B_proj.shape[0] // self.A.shape[1]

    def new_cache(self, sizes: CacheSizes) -> MambaCache:
        channels, state_size = self.A.shape
        conv, inputs = (channels, self.conv_weight.shape[1]), ((channels,), (channels,), (self._groups, state_size))
        materialize = MaterializeScanState(self.A, self._groups, self.backend)
        replay = sizes.replay(REPLAY_IS_FASTER)
        return new_mamba_cache(sizes, replay, (channels, state_size), conv, inputs, self.A.device, materialize)

    def __call__(self, hidden: torch.Tensor, batch: int, cache: MambaCache, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations; writes the cache."""
        channels, state_size = self.A.shape
        z, x, B, C, dt = (
            skinny_linear(hidden, weight, backend=self.backend)
            for weight in (self.z_proj, self.x_proj, self.B_proj, self.C_proj, self.dt_down)
        )
        # These layers were trained with the bias of dt twice: here, and before softplus.
        dt = skinny_linear(dt, self.dt_proj, self.dt_bias, backend=self.backend).view(batch, -1, channels)
        x = causal_conv1d_verify(
            x.view(batch, dt.shape[1], -1), self.conv_weight, self.conv_bias, cache.window,
            window.start_slot, window.write_slot, repeat=channels // self.x_proj.shape[0], block=state_size,
            left_padding=window.left_padding, final_state_only=window.final_state_only, backend=self.backend,
        )  # fmt: skip
        B, C = (part.view(batch, dt.shape[1], -1, state_size) for part in (B, C))
        y = selective_scan_verify(
            x, dt, self.A, B, C, self.D, z.view_as(x), self.dt_bias, cache.states, window.start_slot, window.write_slot,
            inputs=cache.inputs, left_padding=window.left_padding, final_state_only=window.final_state_only,
            backend=self.backend,
        )  # fmt: skip
        return skinny_linear(y.view(-1, channels), self.out_proj, backend=self.backend)
