"""Binding to csrc/cpu/commit_tokens.cpp and csrc/cuda/commit_tokens.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import CommitTokensArgs, Record


def commit_tokens(args: CommitTokensArgs) -> torch.Tensor:
    batch, lookahead = args.draft_tokens.shape
    record = new_result(args.draft_tokens, batch, Record.TOKENS + lookahead + 1)
    kernels, where = compiled(args.draft_tokens)
    state = args.state
    kernels.commit_tokens(
        args, where, batch=batch, lookahead=lookahead, vocabulary=args.is_stop.shape[1], steps=state.slots.shape[0],
        capacity=0 if args.text is None else args.text.shape[1], last=state.last, positions=state.positions,
        remaining=state.remaining, active=state.active, slots=state.slots, record=record,
    )  # fmt: skip
    return record
