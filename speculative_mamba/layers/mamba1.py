"""The Mamba-1 mixer (Gu and Dao 2023, arXiv 2312.00752), also with norms of dt, B and C: Jamba's (arXiv 2403.19887) and
Falcon-Mamba's (arXiv 2410.05355)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.block_weight import BlockWeight
from .cache import CacheSizes, MambaCache, Window, new_mamba_cache
from .materialize_state import MaterializeScanState
from .model_ops import causal_conv1d_verify, rms_norm, selective_scan_verify, skinny_linear

# Replay takes a third of the memory; which is faster differs from run to run (python -m benchmarks.checkpoints).
REPLAY_IS_FASTER = False


@dataclass(frozen=True)
class Mamba1Mixer:
    """Weights of one mixer; R is the rank of dt. A, D and dt_bias are float32, whatever the other weights are;
    only the four ``*_proj`` may be in blocks.

    in_proj (2D, d), conv_weight (D, W), conv_bias (D) or None, x_proj (R+2N, D), dt_proj (D, R), dt_bias (D), A (D, N),
    D (D), out_proj (d, D); in_bias (2D) and out_bias (d) or None. norms: weights of RMS norms of
    dt (R), B (N) and C (N), or None.
    """

    in_proj: torch.Tensor | BlockWeight
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    x_proj: torch.Tensor | BlockWeight
    dt_proj: torch.Tensor | BlockWeight
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    out_proj: torch.Tensor | BlockWeight
    in_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    norms: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    norm_eps: float = 1e-6
    backend: str = "auto"

    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Stored with the channels of a tap side by side, which is how the kernel reads them.
        object.__setattr__(self, "conv_weight", self.conv_weight.t().contiguous().t())

    def new_cache(self, sizes: CacheSizes) -> MambaCache:
        channels, state_size = self.A.shape
        conv, inputs = (channels, self.conv_weight.shape[1]), ((channels,), (channels,), (1, state_size))
        materialize = MaterializeScanState(self.A, 1, self.backend)
        replay = sizes.replay(REPLAY_IS_FASTER)
        return new_mamba_cache(sizes, replay, (channels, state_size), conv, inputs, self.A.device, materialize)

    def __call__(self, hidden: torch.Tensor, batch: int, cache: MambaCache, window: Window) -> torch.Tensor:
        """hidden (B·T, d) → (B·T, d), activations; writes the cache."""
        channels, state_size = self.A.shape
        rank = self.dt_proj.shape[1]
        xz = skinny_linear(hidden, self.in_proj, self.in_bias, backend=self.backend).view(batch, -1, 2 * channels)
        x, z = xz[..., :channels], xz[..., channels:]
        x = causal_conv1d_verify(
            x, self.conv_weight, self.conv_bias, cache.window, window.start_slot, window.write_slot,
            left_padding=window.left_padding, final_state_only=window.final_state_only, backend=self.backend,
        )  # fmt: skip
        projected = skinny_linear(x.view(-1, channels), self.x_proj, backend=self.backend)
        parts = projected.split([rank, state_size, state_size], 1)
        if self.norms is not None:
            parts = [
                rms_norm(part, weight, eps=self.norm_eps, backend=self.backend)[0]
                for part, weight in zip(parts, self.norms, strict=True)
            ]
        dt, B, C = parts
        dt = skinny_linear(dt, self.dt_proj, backend=self.backend)
        y = selective_scan_verify(
            x, dt.view_as(x), self.A, B.unflatten(0, (batch, -1)), C.unflatten(0, (batch, -1)), self.D, z, self.dt_bias,
            cache.states, window.start_slot, window.write_slot, inputs=cache.inputs,
            left_padding=window.left_padding, final_state_only=window.final_state_only, backend=self.backend,
        )  # fmt: skip
        return skinny_linear(y.view(-1, channels), self.out_proj, self.out_bias, backend=self.backend)
