"""Where the rows of a batch stand between two rounds."""

from dataclasses import dataclass

import torch

RECORD_COLUMNS = 5  # of a record, beside the drafted tokens


@dataclass
class BatchState:
    """Contiguous tensors on the rows' device. Within rounds ``commit_tokens`` alone writes them.

    last: (B, 2) int64, the last two tokens of each text.
    positions: (B) int64, the length of each text, which is the position of its next token.
    room: (B) int32, tokens that may still come, less one: what a round may draft. -1 when the budget is used up.
    active: (B) bool, rows that are generating.
    slots: (S, B) int32, where step s of the next round starts: row 0 holds the slot of each last committed token, row
        s the number s; -1 in all of them for a row that is not active.
    """

    last: torch.Tensor
    positions: torch.Tensor
    room: torch.Tensor
    active: torch.Tensor
    slots: torch.Tensor
