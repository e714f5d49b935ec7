"""What an implementation is given."""

from dataclasses import dataclass

import torch

from ..sampling_tensors import SamplingTensors


@dataclass(frozen=True)
class AcceptArgs:
    """All but the logits (B, K+1, V), checked. See ``speculative_accept`` and, for those with K = 0 only,
    ``sample_tokens``.

    draft_tokens: (B, R) with R of at least K: the last K are tested, those before only count as text.
    draft_probs: (B, K, V), None: drafted tokens were certain. purpose: of the noise that tokens are drawn with.
    target_probs: (B, V), None: **written** with K = 0.
    """

    draft_tokens: torch.Tensor
    draft_probs: torch.Tensor | None
    sampling: SamplingTensors
    rng_keys: torch.Tensor
    positions: torch.Tensor
    purpose: int
    coupled: bool
    prompt_mask: torch.Tensor | None
    output_counts: torch.Tensor | None
    active: torch.Tensor | None
    num_draft_tokens: torch.Tensor | None
    target_probs: torch.Tensor | None
