"""Binding to csrc/cpu/speculative_accept.cpp and csrc/cuda/speculative_accept.cu."""

import torch

from ..backend import address, compiled
from ..filters import Filters
from ..recording import law_scratch, scratch


def speculative_accept(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    laws: torch.Tensor | None,
    filters: Filters,
    keys: torch.Tensor,
    positions: torch.Tensor,
    coupled: bool,
    seen: torch.Tensor | None,
    active: torch.Tensor | None,
    limits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, vocabulary = logits.shape
    accepted, verdicts = (logits.new_empty(batch, dtype=torch.int32) for _ in range(2))
    following = logits.new_empty(batch, dtype=torch.int64)
    kernels, where = compiled(logits)
    decisions = scratch(kernels, logits, batch * tokens, torch.int64)
    memory = law_scratch(kernels, logits, batch * tokens)
    kernels.speculative_accept(
        batch, tokens, vocabulary, logits.data_ptr(), logits.stride()[:2], drafted.data_ptr(), address(laws),
        (0, 0) if laws is None else laws.stride()[:2], filters.values(), coupled, address(seen), keys.data_ptr(),
        positions.data_ptr(), address(active), accepted.data_ptr(), following.data_ptr(), verdicts.data_ptr(),
        decisions.data_ptr(), memory.data_ptr(), address(limits), where,
    )  # fmt: skip
    return accepted, following, verdicts
