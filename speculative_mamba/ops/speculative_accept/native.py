"""Binding to csrc/cpu/speculative_accept.cpp and csrc/cuda/speculative_accept.cu."""

import torch

from ..backend import compiled
from ..recording import scratch
from . import SpeculativeAcceptArgs


def speculative_accept(args: SpeculativeAcceptArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = args.logits
    batch, tokens, vocabulary = logits.shape
    accepted, verdicts = (logits.new_empty(batch, dtype=torch.int32) for _ in range(2))
    following = logits.new_empty(batch, dtype=torch.int64)
    kernels, where = compiled(logits)
    kernels.speculative_accept(
        args, where, batch=batch, tokens=tokens, vocabulary=vocabulary, **args.filters.fields(), accepted=accepted,
        next=following, verdicts=verdicts, scratch=scratch(logits),
    )  # fmt: skip
    return accepted, following, verdicts
