"""From logits to probabilities and from probabilities to a token: the specification, in PyTorch."""

from enum import IntEnum

import torch

from .sampling_tensors import SamplingTensors

ROUNDING = 1e-6  # bounds are met up to the rounding of float32
SMALLEST = -87.0  # weights of exp(-87) and below count as 0


class RowStatus(IntEnum):
    """What came of a row's logits; as in csrc/params.h."""

    OK = 0
    NAN_LOGITS = 1
    INFINITE_LOGITS = 2
    NO_TOKEN = 3
    BAD_DRAFT_PROBS = 4
    BAD_RESIDUAL = 5


ROW_STATUS_TEXTS = {
    RowStatus.NAN_LOGITS: "logits are NaN; the checkpoint is broken or its numbers overflow",
    RowStatus.INFINITE_LOGITS: "logits are infinite; the checkpoint is broken or its numbers overflow",
    RowStatus.NO_TOKEN: "every token has probability 0, so there is none to draw",
    RowStatus.BAD_DRAFT_PROBS: "draft_probs give the drafted token no probability; they must be the rows that the "
    "tokens were drawn from",
    RowStatus.BAD_RESIDUAL: "the residual max(p - q, 0) is empty or not finite; rows of draft_probs do not sum to 1",
}


def adjust_logits(
    logits: torch.Tensor,
    sampling: SamplingTensors,
    prompt_mask: torch.Tensor | None,
    output_counts: torch.Tensor | None,
) -> torch.Tensor:
    """Logits (B, V) after bias and penalties. prompt_mask: (B, V) bool, tokens of the prompt. output_counts: (B, V),
    how often each token was generated; both are read only if there are penalties."""
    if sampling.bias_capacity:
        used = sampling.bias_ids >= 0
        at = used.nonzero(as_tuple=True)
        logits = logits.clone()
        logits[at[0], sampling.bias_ids[used].long()] += sampling.bias_values[used]
    if sampling.has_penalties:
        repetition, presence, frequency = (
            penalty[:, None]
            for penalty in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        )
        generated = output_counts > 0
        lowered = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(prompt_mask | generated, lowered, logits)
        logits = torch.where(generated, logits - frequency * output_counts - presence, logits)
    return logits


def row_status(logits: torch.Tensor, greedy: bool) -> RowStatus:
    """Whether a token can be chosen from a row of adjusted logits (V)."""
    if logits.isnan().any():
        return RowStatus.NAN_LOGITS
    peak = logits.max().item()
    if peak == -torch.inf:
        return RowStatus.NO_TOKEN
    return RowStatus.INFINITE_LOGITS if peak == torch.inf and not greedy else RowStatus.OK


def probs_from_logits(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """What is sampled: adjusted logits (B, V) float32 → probabilities (B, V) float32, exact zeros where filtered."""
    temperature, top_k, top_p, min_p = (
        value[:, None] for value in (sampling.temperature, sampling.top_k, sampling.top_p.double(), sampling.min_p)
    )
    likeliest = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    weights = torch.where(scaled > SMALLEST, scaled.exp(), 0)
    ranks = (top_k > 0) & (top_k < logits.shape[-1])
    if (ranks | (top_p < 1)).any():
        order = logits.argsort(dim=-1, descending=True, stable=True)
        kept = weights.gather(-1, order)
        kept[ranks & (torch.arange(logits.shape[-1], device=logits.device) >= top_k)] = 0
        before = kept.double().cumsum(-1) - kept
        dropped = (before >= (top_p - ROUNDING) * kept.double().sum(-1, keepdim=True)) & (top_p < 1)
        dropped[..., 0] = False
        kept.masked_fill_(dropped, 0)
        weights = torch.zeros_like(weights).scatter_(-1, order, kept)
    weights.masked_fill_(weights < (min_p.double() * (1 - ROUNDING)).float(), 0)
    return torch.where(temperature == 0, likeliest, (weights / weights.double().sum(-1, keepdim=True)).float())


def gumbel_argmax(weights: torch.Tensor, exponentials: torch.Tensor) -> int:
    """A token, computed as an exponential race: the smallest E / w wins, of equals the lowest id. weights (V), E (V)
    float64."""
    arrivals = torch.where(weights > 0, exponentials / weights.double(), torch.inf)
    return int(arrivals.argmin())


def raise_for(row_status: torch.Tensor, accepted: torch.Tensor | None = None) -> None:
    """What two ops do with row_status (B) int32 unless it is to be left in a tensor; waits for the device.

    accepted: (B), the first result of ``speculative_accept``, whose statuses these are; None: those of
    ``sample_tokens``.

    Raises:
        ValueError: one is not OK; the line names the row, and with ``accepted`` the position of the window.
    """
    for row, code in enumerate(row_status.tolist()):
        if code:
            place = f"row {row}" if accepted is None else f"row {row}, position {accepted[row]} of the window"
            raise ValueError(f"{place}: {ROW_STATUS_TEXTS[RowStatus(code)]}")
