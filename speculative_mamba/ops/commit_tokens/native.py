"""Binding to csrc/cpu/commit_tokens.cpp and csrc/cuda/commit_tokens.cu."""

import torch

from ..backend import address, compiled
from ..recording import new_result
from .rows import BatchState


def commit_tokens(
    drafted: torch.Tensor,
    accepted: torch.Tensor,
    following: torch.Tensor,
    verdicts: torch.Tensor,
    limits: torch.Tensor,
    is_stop: torch.Tensor,
    rows: BatchState,
    output_counts: torch.Tensor | None,
    text: torch.Tensor | None,
) -> torch.Tensor:
    batch, lookahead = drafted.shape
    record = new_result(drafted, batch, lookahead + 5)
    kernels, where = compiled(drafted)
    kernels.commit_tokens(
        batch, lookahead, len(is_stop), len(rows.slots), 0 if text is None else text.shape[1], drafted.data_ptr(),
        accepted.data_ptr(), following.data_ptr(), verdicts.data_ptr(), limits.data_ptr(), is_stop.data_ptr(),
        rows.last.data_ptr(), rows.positions.data_ptr(), rows.room.data_ptr(), rows.active.data_ptr(),
        rows.slots.data_ptr(), address(output_counts), address(text), record.data_ptr(), where,
    )  # fmt: skip
    return record
