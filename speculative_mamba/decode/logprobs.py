"""Log-probabilities of tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

MAX_LOGPROBS = 20


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the target's probabilities, before bias, penalties and temperature. logprob: of the token
    that was chosen. top: ids of the likeliest tokens in its place, the likeliest first, and theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Those of tokens and of the ``count`` likeliest ones. logits: (n, V)."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    likeliest = (tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True))
    return [TokenLogprobs(*row) for row in zip(chosen, likeliest, strict=True)]
