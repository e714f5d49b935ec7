"""Candidates of every position, in Triton: what top-k, top-p and min-p may keep, after bias and penalties."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .sampling_tensors import SamplingTensors
from .triton_math import launch
from .triton_probs import (
    BLOCK,
    INFINITE,
    WARPS,
    is_adjusted,
    logit_of,
    logits_of,
    row_sampling,
    search,
    sort_key,
    weight_of,
)

GROUP = tl.constexpr(32)  # tokens of which the greatest is looked at first
TILE = tl.constexpr(4096)  # tokens that a program looks at together
GROUPS = tl.constexpr(128)  # of a tile


@triton.jit(do_not_specialize=["tokens", "counted", "draft_stride"])
def _adjust(
    logits, adjusted, penalties, bias, prompt_mask, output_counts, draft_tokens, tokens, vocabulary, counted,
    draft_stride,
):  # fmt: skip
    """Bias and penalties of rows that have any. At position t the first ``counted`` + t draft tokens are text."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    position = (tl.program_id(0) // blocks).to(tl.int64)
    b, t = position // tokens, position % tokens
    if is_adjusted(penalties, bias, b) == 0:
        return
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = token < vocabulary
    x = tl.load(logits[0] + b * logits[1] + t * logits[2] + token, mask=exists)
    if bias is not None:
        for i in range(bias[2]):
            at = b * bias[2] + i
            x = tl.where(token == tl.load(bias[0] + at), x + tl.load(bias[1] + at), x)
    if penalties is not None:
        repetition, presence, frequency = (
            tl.load(penalties[0] + b), tl.load(penalties[1] + b), tl.load(penalties[2] + b)
        )  # fmt: skip
        count = tl.load(output_counts + b * vocabulary + token, mask=exists, other=0)
        for i in range(counted + t):
            count += (token == tl.load(draft_tokens + b * draft_stride + i)).to(tl.int32)
        generated = count > 0
        in_text = generated | (tl.load(prompt_mask + b * vocabulary + token, mask=exists, other=0) != 0)
        x = tl.where(in_text, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        x = tl.where(generated, x - frequency * count.to(tl.float32) - presence, x)
    tl.store(adjusted + position * vocabulary + token, x, mask=exists)


@triton.jit(do_not_specialize=["tokens"])
def _maxima(logits, adjusted, penalties, bias, maxima, tokens, vocabulary):
    """The greatest key of every group of tokens."""
    groups = tl.cdiv(vocabulary, GROUP)
    tiles = tl.cdiv(vocabulary, TILE)
    position = (tl.program_id(0) // tiles).to(tl.int64)
    group = tl.program_id(0) % tiles * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row = logits_of(logits, adjusted, penalties, bias, position, tokens, vocabulary)
    x = tl.load(row + token, mask=token < vocabulary, other=-INFINITE)
    tl.store(maxima + position * groups + group, tl.max(sort_key(x), 1), mask=group < groups)


@triton.jit
def _total(row, vocabulary, peak, temperature):
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(0, vocabulary, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row + token, mask=token < vocabulary, other=-INFINITE)
        sums += weight_of(x, peak, temperature).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["tokens"])
def _list(
    logits, adjusted, penalties, bias, sampling, maxima, status, peaks, min_keys, totals, counts, ids, keys, weights,
    tokens, vocabulary,
):  # fmt: skip
    """With top-k all tokens from the k-th of the groups' greatest keys on; else all but tokens so light that together
    they make no difference."""
    position = tl.program_id(0).to(tl.int64)
    temperature, top_k, nucleus, floor, greedy = row_sampling(sampling, position // tokens, vocabulary)
    row = logits_of(logits, adjusted, penalties, bias, position, tokens, vocabulary)
    ids, keys, weights = ids + position * vocabulary, keys + position * vocabulary, weights + position * vocabulary
    groups = tl.cdiv(vocabulary, GROUP)
    maxima += position * groups
    greatest = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        greatest = tl.maximum(greatest, tl.load(maxima + group, mask=group < groups, other=0))
    peak = logit_of(tl.max(greatest, 0))
    found = tl.where(peak == -INFINITE, 3, tl.where((peak == INFINITE) & (greedy == 0), 2, 0))
    found = tl.where(peak == peak, found, 1)
    tl.store(status + position, found)
    tl.store(peaks + position, peak)
    if found == 0:
        least = tl.full((), 0, tl.uint32)
        total = tl.full((), 0.0, tl.float64)
        lightest = floor  # that may be kept
        if top_k > 0:
            lightest = floor * 0
            least = sort_key(peak)
            if top_k > 1:
                least, _, _ = search(maxima, None, groups, top_k.to(tl.float64))
        elif nucleus < 1:
            total = _total(row, vocabulary, peak, temperature)
            lightest = ((1 - nucleus) * total / vocabulary).to(tl.float32)  # the nucleus is reached without all below
        count = 0
        for start in range(0, groups, GROUPS):
            group = start + tl.arange(0, GROUPS)
            key = tl.load(maxima + group, mask=group < groups, other=0)
            if tl.max((key >= least).to(tl.int32), 0) == 1:
                token = start * GROUP + tl.arange(0, TILE)
                x = tl.load(row + token, mask=token < vocabulary, other=-INFINITE)
                weight = weight_of(x, peak, temperature)
                lists = (token < vocabulary) & (sort_key(x) >= least) & (weight >= lightest)
                at = count + tl.cumsum(lists.to(tl.int32), 0) - 1
                tl.store(ids + at, token, mask=lists)
                tl.store(keys + at, sort_key(x), mask=lists)
                tl.store(weights + at, weight, mask=lists)
                count += tl.sum(lists.to(tl.int32), 0)
        tl.store(min_keys + position, least)
        tl.store(totals + position, total)
        tl.store(counts + position, count)


@dataclass
class Candidates:
    """Of every position of logits (B, T, V)."""

    status: torch.Tensor  # (B, T) int32: 0, or why no token can be chosen; then the rest is undefined
    peaks: torch.Tensor  # (B, T): the greatest logit
    min_keys: torch.Tensor  # (B, T) uint32: the least key that a candidate may have
    totals: torch.Tensor  # (B, T) float64: the sum of all weights, where top-p sees the whole vocabulary
    counts: torch.Tensor  # (B, T) int32
    ids: torch.Tensor  # (B, T, V) int32
    keys: torch.Tensor  # (B, T, V) uint32
    weights: torch.Tensor  # (B, T, V)
    inputs: dict[str, object]  # logits and parameters, as kernels take them

    def arguments(self) -> dict[str, object]:
        """Of a kernel that takes candidates."""
        return {**self.inputs, **{name: value for name, value in vars(self).items() if name != "inputs"}}


def with_strides(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    return tensor, tensor.stride(0), tensor.stride(1)


def candidates(
    logits: torch.Tensor,
    sampling: SamplingTensors,
    prompt_mask: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    draft_tokens: torch.Tensor,
) -> Candidates:
    """logits (B, T, V); at position t the text has the tokens that are counted and all but the last T - 1 - t of
    draft_tokens (B, R)."""
    batch, tokens, vocabulary = logits.shape
    positions = batch * tokens

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(batch, tokens, *shape, dtype=dtype, device=logits.device)

    penalties = bias = None
    if sampling.has_penalties:
        penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    if sampling.bias_capacity:
        bias = sampling.bias_ids, sampling.bias_values, sampling.bias_capacity
    adjusts = penalties is not None or bias is not None
    rows = {
        "logits": with_strides(logits), "adjusted": new(torch.float32, vocabulary) if adjusts else None,
        "penalties": penalties, "bias": bias, "tokens": tokens, "vocabulary": vocabulary,
    }  # fmt: skip
    if adjusts:
        launch(
            _adjust, positions * triton.cdiv(vocabulary, BLOCK.value), logits, WARPS, **rows, prompt_mask=prompt_mask,
            output_counts=output_counts, draft_tokens=draft_tokens, counted=draft_tokens.shape[1] - (tokens - 1),
            draft_stride=draft_tokens.shape[1],
        )  # fmt: skip
    maxima = new(torch.uint32, triton.cdiv(vocabulary, GROUP.value))
    launch(_maxima, positions * triton.cdiv(vocabulary, TILE.value), logits, WARPS, **rows, maxima=maxima)
    parameters = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    made = Candidates(
        new(torch.int32), new(torch.float32), new(torch.uint32), new(torch.float64), new(torch.int32),
        new(torch.int32, vocabulary), new(torch.uint32, vocabulary), new(torch.float32, vocabulary),
        {**rows, "sampling": parameters},
    )  # fmt: skip
    launch(_list, positions, logits, WARPS, maxima=maxima, **made.arguments())
    return made
