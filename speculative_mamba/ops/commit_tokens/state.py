"""Where the rows of a batch stand between two rounds, and what a round reports."""

from dataclasses import dataclass
from enum import IntEnum

import torch

from ..checks import check, check_contiguous, check_written


class Record(IntEnum):
    """Columns of a record, the last of which is the first of K+1; as in csrc/params.h."""

    NUM_COMMITTED = 0
    ACCEPTED = 1
    ROW_STATUS = 2
    DRAFT_STATUS = 3
    NUM_DRAFT_TOKENS = 4
    FINISH_REASON = 5
    TOKENS = 6


class FinishReason(IntEnum):
    """Why a row ended, as far as the device knows; as in csrc/params.h."""

    NONE = 0
    EOS = 1
    LENGTH = 2


@dataclass(frozen=True)
class BatchState:
    """Contiguous tensors on the rows' device. Within rounds ``commit_tokens`` alone writes them.

    last: (B, 2) int64, the last two tokens of each text.
    positions: (B) int64, the length of each text, which is the position of its next token.
    remaining: (B) int32, tokens that may still come.
    active: (B) bool, rows that are generating.
    slots: (S, B) int32, where step s of the next round starts: row 0 holds the slot of each last committed token, row
        s the number s; -1 in all of them for a row that is not active.

    Raises:
        ValueError: a shape, dtype or device does not fit, or two share memory.
    """

    last: torch.Tensor
    positions: torch.Tensor
    remaining: torch.Tensor
    active: torch.Tensor
    slots: torch.Tensor

    def __post_init__(self) -> None:
        batch = len(self.last)
        if self.slots.ndim != 2:
            raise ValueError(f"state.slots must have shape (S, {batch}), got {tuple(self.slots.shape)}")
        expected = {
            "state.last": (self.last, (batch, 2), torch.int64),
            "state.positions": (self.positions, (batch,), torch.int64),
            "state.remaining": (self.remaining, (batch,), torch.int32),
            "state.active": (self.active, (batch,), torch.bool),
            "state.slots": (self.slots, (len(self.slots), batch), torch.int32),
        }
        for name, (tensor, shape, dtype) in expected.items():
            check(name, tensor, shape, self.last, dtype)
            check_contiguous(name, tensor)
        check_written({name: tensor for name, (tensor, _, _) in expected.items()}, {})
