"""Checkpoints by replay: one state and the inputs since, instead of a state for every slot."""

from dataclasses import dataclass

import torch


@dataclass
class ReplayBuffer:
    """What a scan has to be fed again to get from the one kept state to the state of a slot.

    The scan's ``states`` then has a single slot, (B, 1, …), the state before input 0, and the state of slot j is that
    state after inputs 0 … j. An input whose dt is 0 counts as nothing.

    x: (B, S, D) for Mamba-1, (B, S, X, P) for Mamba-2, where X heads of x serve H heads of states. dt: (B, S, D) or
    (B, S, H), after bias, softplus and limits. B: (B, S, G, N). All float32 and contiguous; S is the number of slots.

    - A call with ``write_slot`` 0 feeds inputs 0 … ``start_slot``, leaves the state reached as the one kept state,
      scans its T tokens from there and leaves their inputs as inputs 0 … T-1.
    - A call with ``write_slot`` w > 0 must start from slot w-1 in every row that is not left out. It feeds inputs
      0 … w-1, leaves the kept state alone, and adds its tokens' inputs as w … w+T-1.
    - With ``final_state_only`` the kept state becomes that after the last token, and input 0 gets dt 0: slot 0 is that
      state.

    The instructions and their order are those of the scan with a state per slot, so results are equal bit for bit.
    """

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor

    @property
    def slots(self) -> int:
        return self.dt.shape[1]


def replay_tensors(inputs: ReplayBuffer | None) -> dict[str, torch.Tensor]:
    """By the names that errors give them."""
    return {} if inputs is None else {f"inputs.{name}": tensor for name, tensor in vars(inputs).items()}
