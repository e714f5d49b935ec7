"""Where the rows of a batch stand between two rounds, and what a round reports."""

from collections.abc import Sequence
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

    last: (B, 2) int64, the last two tokens of each text; 0 before the only one.
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

    @classmethod
    def empty(cls, batch: int, steps: int, device: torch.device | str) -> "BatchState":
        """All rows are left out. steps: S."""
        return cls(
            last=torch.zeros(batch, 2, dtype=torch.int64, device=device),
            positions=torch.zeros(batch, dtype=torch.int64, device=device),
            remaining=torch.zeros(batch, dtype=torch.int32, device=device),
            active=torch.zeros(batch, dtype=torch.bool, device=device),
            slots=torch.full((steps, batch), -1, dtype=torch.int32, device=device),
        )

    def admit(self, row: int, text: Sequence[int], remaining: int) -> None:
        """A row goes on from this text, whose last token is not read yet; the state before it is in slot 0."""
        device = self.last.device
        self.last[row] = torch.tensor([0, *text[-2:]][-2:], dtype=torch.int64, device=device)
        self.positions[row] = len(text)
        self.remaining[row] = remaining
        self.slots[:, row] = torch.arange(self.slots.shape[0], dtype=torch.int32, device=device)
        self.active[row] = True

    def leave_out(self, row: int | None = None) -> None:
        """From the next round on a row, or all of them, stay as they are."""
        rows = slice(None) if row is None else row
        self.active[rows] = False
        self.slots[:, rows] = -1
