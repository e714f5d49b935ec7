"""From a state and the inputs since to the state of a slot."""

from dataclasses import dataclass

import torch

from ..ops import selective_scan_verify, ssd_verify
from .cache import MambaCache


@dataclass(frozen=True)
class MaterializeScanState:
    """For Mamba-1: ``materialize_state`` of a ``MambaCache``. A (D, N); groups of B and C."""

    A: torch.Tensor
    groups: int
    backend: str

    def __call__(self, cache: MambaCache, slot: int) -> None:
        A, (channels, state_size) = self.A, self.A.shape
        nothing, start, left_padding = _padding_token(A, (1, 1, channels), slot)
        BC, D = A.new_zeros(1, 1, self.groups, state_size), A.new_zeros(channels)
        selective_scan_verify(
            nothing, nothing, A, BC, BC, D, None, D, cache.states, start,
            inputs=cache.inputs, left_padding=left_padding, final_state_only=True, backend=self.backend,
        )  # fmt: skip


@dataclass(frozen=True)
class MaterializeSsdState:
    """For Mamba-2: ``materialize_state`` of a ``MambaCache``. A (H); x_shape (X, P), B_shape (G, N)."""

    A: torch.Tensor
    x_shape: tuple[int, int]
    B_shape: tuple[int, int]
    backend: str

    def __call__(self, cache: MambaCache, slot: int) -> None:
        A = self.A
        x, start, left_padding = _padding_token(A, (1, 1, *self.x_shape), slot)
        BC, D = A.new_zeros(1, 1, *self.B_shape), torch.zeros_like(A)
        ssd_verify(
            x, D.view(1, 1, -1), A, BC, BC, D, D, cache.states, start,
            inputs=cache.inputs, left_padding=left_padding, final_state_only=True, backend=self.backend,
        )  # fmt: skip


def _padding_token(like: torch.Tensor, shape: tuple[int, ...], slot: int) -> tuple[torch.Tensor, ...]:
    """A token that counts as nothing, after the one in ``slot``: its input, start_slot, left_padding."""
    start = torch.tensor([slot], dtype=torch.int32, device=like.device)
    return like.new_zeros(shape), start, torch.ones_like(start)
