"""Binding to csrc/cpu/sample_tokens.cpp and csrc/cuda/sample_tokens.cu."""

import torch

from ..backend import address, compiled
from ..filters import Filters
from ..recording import law_scratch


def sample_tokens(
    logits: torch.Tensor,
    filters: Filters,
    keys: torch.Tensor,
    positions: torch.Tensor,
    purpose: int,
    laws: torch.Tensor | None,
    seen: torch.Tensor | None,
    recent: torch.Tensor,
    active: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, vocabulary = logits.shape
    tokens, verdicts = (logits.new_empty(batch, dtype=dtype) for dtype in (torch.int64, torch.int32))
    kernels, where = compiled(logits)
    memory = law_scratch(kernels, logits, batch)
    kernels.sample_tokens(
        batch, vocabulary, logits.data_ptr(), logits.stride(0), filters.values(), address(seen), recent.data_ptr(),
        recent.shape[1], keys.data_ptr(), positions.data_ptr(), purpose, address(active), address(laws),
        0 if laws is None else laws.stride(0), tokens.data_ptr(), verdicts.data_ptr(), memory.data_ptr(),
        where,
    )  # fmt: skip
    return tokens, verdicts
