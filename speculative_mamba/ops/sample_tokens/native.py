"""Binding to csrc/cpu/sample_tokens.cpp and csrc/cuda/sample_tokens.cu."""

import torch

from ..backend import compiled
from ..recording import scratch
from . import SampleTokensArgs


def sample_tokens(args: SampleTokensArgs) -> tuple[torch.Tensor, torch.Tensor]:
    logits = args.logits
    batch, vocabulary = logits.shape
    tokens, verdicts = (logits.new_empty(batch, dtype=dtype) for dtype in (torch.int64, torch.int32))
    kernels, where = compiled(logits)
    kernels.sample_tokens(
        args, where, batch=batch, vocabulary=vocabulary, **args.filters.fields(), recent_tokens=args.recent.shape[1],
        tokens=tokens, verdicts=verdicts, scratch=scratch(logits),
    )  # fmt: skip
    return tokens, verdicts
