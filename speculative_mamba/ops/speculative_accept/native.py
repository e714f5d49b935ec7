"""Binding to csrc/cpu/speculative_accept.cpp."""

import torch

from ..backend import address, extension
from ..filters import Filters


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, vocabulary = logits.shape
    accepted, verdicts = torch.empty(batch, dtype=torch.int32), torch.empty(batch, dtype=torch.int32)
    following = torch.empty(batch, dtype=torch.int64)
    extension()[0].speculative_accept(
        batch, tokens, vocabulary, logits.data_ptr(), logits.stride()[:2], drafted.data_ptr(), address(laws),
        (0, 0) if laws is None else laws.stride()[:2], filters.values(), coupled, address(seen), keys.data_ptr(),
        positions.data_ptr(), address(active), accepted.data_ptr(), following.data_ptr(), verdicts.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return accepted, following, verdicts
