"""Processors of logits that transformers made: those that the sampler knows are its parameters, others run as they are.

transformers has them in this order: the repetition penalty, whatever else changes or forbids tokens, processors of the
caller, temperature, top-k, top-p, min-p. The sampler's own come last. So the longest end of the list that it can stand
for becomes parameters, and what comes before runs in Python, in its order.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..decode.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

# What keeps a memory of earlier calls, or calls the model: neither is known of a window of drafted tokens.
_STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
)


def sampling_of(
    processors: "LogitsProcessorList", do_sample: bool, seed: object, padding: torch.Tensor
) -> tuple[SamplingParams, "LogitsProcessorList"]:
    """The sampler's parameters, and the processors before it.

    padding: (B), tokens before each row's text. Greedy decoding takes no notice of what leaves the likeliest as it is.

    Raises:
        ValueError: a processor has a memory, or the seed is none.
    """
    for processor in processors:
        if type(processor).__name__ in _STATEFUL:
            raise ValueError(f"{type(processor).__name__} has no meaning for speculative_generate: it has a memory")
    known, rest = _known(padding), list(processors)
    names, fields, limit = list(known), {}, len(known)
    while rest:
        name = type(rest[-1]).__name__
        if name == "LogitNormalization":
            rest.pop()
            continue
        found = known[name](rest[-1]) if name in names[:limit] else None
        if found is None:
            break
        limit = names.index(name)
        fields |= found
        rest.pop()
    fields = {"temperature": 1.0} | fields
    if not do_sample:
        fields = {"repetition_penalty": fields.get("repetition_penalty", 1.0), "temperature": 0.0}
    return SamplingParams(**fields, seed=seed), type(processors)(rest)


def _known(padding: torch.Tensor) -> dict[str, Callable[[Any], dict[str, float] | None]]:
    """In the sampler's order: what reads each, None where it asks for what the sampler has not."""

    def penalty(its: Any) -> dict[str, float] | None:
        ignored = vars(its).get("prompt_ignore_length")
        if isinstance(ignored, torch.Tensor):
            ignored = None if torch.equal(ignored.cpu(), padding.cpu()) else ignored
        return None if ignored is not None else {"repetition_penalty": float(its.penalty)}

    return {
        "RepetitionPenaltyLogitsProcessor": penalty,
        "TemperatureLogitsWarper": lambda its: {"temperature": float(its.temperature)},
        "TopKLogitsWarper": lambda its: _filter(its, "top_k", int(its.top_k)),
        "TopPLogitsWarper": lambda its: _filter(its, "top_p", float(its.top_p)) if its.top_p > 0 else None,
        "MinPLogitsWarper": lambda its: _filter(its, "min_p", float(its.min_p)) if its.min_p < 1 else None,
    }


def _filter(its: Any, name: str, value: float) -> dict[str, float] | None:
    """A top-k has the tokens to keep in any case in its k already."""
    at_least = vars(its).get("min_tokens_to_keep", 1)
    return {name: value} if at_least == 1 and its.filter_value == -math.inf else None


class RowProcessors:
    """Processors for one row and position at a time, as ``generate(logits_processor=)`` takes them.

    They are made for the whole batch, so a row is shown to them as a batch of copies of itself, behind its padding.
    """

    def __init__(self, processors: "LogitsProcessorList", input_ids: torch.Tensor, padding: torch.Tensor) -> None:
        self._processors, self._device, self._size = processors, input_ids.device, len(input_ids)
        self._pads = [row[:count] for row, count in zip(input_ids.tolist(), padding.tolist(), strict=True)]

    def __call__(self, row: int, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        text = torch.tensor([self._pads[row] + tokens], device=self._device).expand(self._size, -1)
        return self._processors(text, logits.repeat(self._size, 1))[row]
