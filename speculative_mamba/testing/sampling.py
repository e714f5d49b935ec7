"""What tests of sampling share: arguments of the ops that choose tokens, and probabilities by hand in float64."""

import math
from collections.abc import Sequence

import torch

from ..ops import sample_tokens
from ..ops.sampling_params import SamplingParams
from ..ops.sampling_tensors import SamplingTensors


def rng_keys_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([torch.full((rows,), seed), torch.arange(rows)], 1)


def tensors(params: SamplingParams | Sequence[SamplingParams], rows: int, vocabulary: int) -> SamplingTensors:
    """Of every row, or of each."""
    return SamplingTensors.from_params([params] * rows if isinstance(params, SamplingParams) else params, vocabulary)


def text_of(prompt_mask: torch.Tensor | None, output_counts: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Arguments for texts whose prompts hold these tokens; nothing is generated unless told."""
    if prompt_mask is None:
        return {}
    if output_counts is None:
        output_counts = torch.zeros(prompt_mask.shape, dtype=torch.int32)
    return {"prompt_mask": prompt_mask, "output_counts": output_counts}


def sample(
    logits: torch.Tensor, params: SamplingParams | list, backend: str, seed: int = 0, seen=None, counts=None, **options
) -> tuple:
    """Tokens (B) and probabilities (B, V) of rows of logits."""
    rows, vocabulary = logits.shape
    probs = torch.full(logits.shape, torch.nan)
    tokens = sample_tokens(
        logits, tensors(params, rows, vocabulary), rng_keys_of(rows, seed), torch.arange(rows) + 3, probs=probs,
        **text_of(seen, counts), backend=backend, **options,
    )  # fmt: skip
    return tokens, probs


def logits_by_hand(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> list[float]:
    """Bias, repetition penalty, frequency penalty, presence penalty. prompt, generated: tokens of the text."""
    adjusted = list(logits)
    for token, bias in params.logit_bias:
        adjusted[token] += bias
    for token in {*prompt, *generated}:
        x = adjusted[token]
        adjusted[token] = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    for token in generated:
        adjusted[token] -= params.frequency_penalty
    for token in set(generated):
        adjusted[token] -= params.presence_penalty
    return adjusted


def probs_by_hand(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> list[float]:
    """As the docstring of ``SamplingParams`` says; of equally likely tokens the lower id is first."""
    adjusted = logits_by_hand(logits, params, prompt, generated)
    peak = max(adjusted)
    if params.greedy:
        return [float(token == adjusted.index(peak)) for token in range(len(adjusted))]
    weights = [math.exp((x - peak) / params.temperature) if x > -math.inf else 0.0 for x in adjusted]
    kept = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = kept[: params.top_k or None]
    total, reached, nucleus = math.fsum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if params.top_p < 1 and reached >= (params.top_p - 1e-6) * total and nucleus:
            break
        nucleus.append(token)
        reached += weights[token]
    nucleus = {token for token in nucleus if weights[token] >= params.min_p * (1 - 1e-6) * weights[kept[0]]}
    total = math.fsum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(weights))]


def assert_probs(probs: torch.Tensor, expected: Sequence[float], what: object = "") -> None:
    """Within 1e-6, and exactly 0 where a token is filtered."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(probs.double(), wanted, atol=1e-6, rtol=1e-5, msg=lambda text: f"{what}: {text}")
    filtered = wanted == 0
    assert (probs[filtered] == 0).all() and (probs[wanted > 1e-30] > 0).all(), f"{what}: another set of tokens is kept"
