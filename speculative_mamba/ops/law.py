"""From logits to a law and from a law to a token: the specification that two ops share, in PyTorch."""

import torch

from .filters import Filters

ROUNDING = 1e-6  # bounds are met up to the rounding of float32
SMALLEST = -87.0  # weights of exp(-87) and below count as 0

VERDICTS = {
    1: "logits are NaN; the checkpoint is broken or its numbers overflow",
    2: "logits are infinite; the checkpoint is broken or its numbers overflow",
    3: "every token has probability 0, so there is none to draw",
    4: "the draft's law gives its own token no probability; laws must be the rows that the tokens were drawn from",
    5: "the residual max(p - q, 0) is empty or not finite; the draft's laws do not sum to 1",
}


def penalised(logits: torch.Tensor, penalty: float, seen: torch.Tensor) -> torch.Tensor:
    """Logits (V) with those of seen tokens (V) bool lowered."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def verdict(logits: torch.Tensor, filters: Filters) -> int:
    """0 if a token can be drawn from a row of logits (V), else a key of ``VERDICTS``."""
    if logits.isnan().any():
        return 1
    peak = logits.max().item()
    if peak == -torch.inf:
        return 3
    return 2 if peak == torch.inf and not filters.greedy else 0


def filtered_law(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """The law that is sampled: logits (..., V) float32 → probabilities (..., V) float32, exact zeros where filtered."""
    if filters.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / filters.temperature
    weights = torch.where(scaled > SMALLEST, scaled.exp(), 0)
    by_rank = 0 < filters.top_k < logits.shape[-1]
    if by_rank or filters.top_p < 1:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        kept = weights.gather(-1, order)
        if by_rank:
            kept[..., filters.top_k :] = 0
        if filters.top_p < 1:
            before = kept.double().cumsum(-1) - kept
            dropped = before >= (filters.top_p - ROUNDING) * kept.double().sum(-1, keepdim=True)
            dropped[..., 0] = False
            kept.masked_fill_(dropped, 0)
        weights = torch.zeros_like(weights).scatter_(-1, order, kept)
    weights.masked_fill_(weights < filters.min_p * (1 - ROUNDING), 0)
    return (weights / weights.double().sum(-1, keepdim=True)).float()


def draw(weights: torch.Tensor, exponentials: torch.Tensor) -> int:
    """A token by an exponential race: the smallest E / w wins, of equals the lowest id. weights (V), E (V) float64."""
    arrivals = torch.where(weights > 0, exponentials / weights.double(), torch.inf)
    return int(arrivals.argmin())


def raise_for(verdicts: torch.Tensor, accepted: torch.Tensor | None = None) -> None:
    """What two ops do with verdicts (B) int32 unless they are to be left in a tensor; waits for the device.

    accepted: (B), the first result of ``speculative_accept``, whose verdicts these are; None: those of
    ``sample_tokens``.

    Raises:
        ValueError: one is not 0; the line names the row, and with ``accepted`` the position of the window.
    """
    for row, code in enumerate(verdicts.tolist()):
        if code:
            place = f"row {row}" if accepted is None else f"row {row}, position {accepted[row]} of the window"
            raise ValueError(f"{place}: {VERDICTS[code]}")
