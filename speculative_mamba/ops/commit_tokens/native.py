"""Binding to csrc/cpu/commit_tokens.cpp and csrc/cuda/commit_tokens.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import CommitTokensArgs
from .rows import RECORD_COLUMNS


def commit_tokens(args: CommitTokensArgs) -> torch.Tensor:
    drafted, rows = args.drafted, args.rows
    batch, lookahead = drafted.shape
    record = new_result(drafted, batch, lookahead + RECORD_COLUMNS)
    kernels, where = compiled(drafted)
    kernels.commit_tokens(
        args, where, batch=batch, lookahead=lookahead, vocabulary=len(args.is_stop), steps=len(rows.slots),
        capacity=0 if args.text is None else args.text.shape[1], **vars(rows), record=record,
    )  # fmt: skip
    return record
