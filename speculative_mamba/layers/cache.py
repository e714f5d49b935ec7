"""Per-position checkpoints of one layer's recurrent state."""

from dataclasses import dataclass

import torch


@dataclass
class MambaCache:
    """What a Mamba layer remembers, in slots: slot j holds the state after token j of the last window.

    states: (B, S, D, N) float32, bfloat16 or float16 (see ``selective_scan_verify``); window: (B, W-1+S, D) float32,
    the convolution's inputs (see ``causal_conv1d_verify``). Slot 0 starts as the zero state; the others hold NaN until
    they are written.
    """

    states: torch.Tensor
    window: torch.Tensor

    @staticmethod
    def allocate(
        batch: int,
        slots: int,
        channels: int,
        state_size: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> "MambaCache":
        states = torch.full((batch, slots, channels, state_size), torch.nan, dtype=dtype, device=device)
        window = torch.full((batch, width - 1 + slots, channels), torch.nan, device=device)
        states[:, 0], window[:, :width] = 0, 0
        return MambaCache(states, window)

    def row(self, index: int) -> "MambaCache":
        """A view of one row."""
        return MambaCache(self.states[index : index + 1], self.window[index : index + 1])

    def checkpoint(self, row: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the state in a row's slot, (D, N), and of the W-1 conv inputs before the token that follows it."""
        history = self.window.shape[1] - self.states.shape[1]
        return self.states[row, slot].clone(), self.window[row, slot + 1 : slot + 1 + history].clone()

    def restore(self, row: int, saved: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Puts a checkpoint into a row's slot 0."""
        state, history = saved
        self.states[row, 0] = state
        self.window[row, 1 : 1 + len(history)] = history
