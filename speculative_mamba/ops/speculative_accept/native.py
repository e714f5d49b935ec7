"""Binding to csrc/cpu/speculative_accept.cpp and csrc/cuda/speculative_accept.cu."""

import torch

from ..backend import compiled
from ..recording import new_result, scratch
from . import SpeculativeAcceptArgs


def speculative_accept(args: SpeculativeAcceptArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = args.logits
    batch, tokens, vocabulary = logits.shape
    accepted, next_token = new_result(logits, batch, dtype=torch.int32), new_result(logits, batch, dtype=torch.int64)
    row_status = new_result(logits, batch, dtype=torch.int32) if args.row_status is None else args.row_status
    kernels, where = compiled(logits)
    kernels.speculative_accept(
        args, where, batch=batch, tokens=tokens, vocabulary=vocabulary,
        draft_stride=0 if args.draft_tokens is None else args.draft_tokens.shape[1],
        **vars(args.sampling), bias_capacity=args.sampling.bias_capacity, accepted=accepted, next_token=next_token,
        row_status=row_status, scratch=scratch(logits),
    )  # fmt: skip
    return accepted, next_token, row_status
