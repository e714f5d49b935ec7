"""Shortlists of the tokens that filters may keep, in Triton: what a law is made from."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .filters import Filters
from .law import ROUNDING
from .triton_law import BLOCK, INFINITE, WARPS, key_of, logit_of, search, weight_of
from .triton_math import launch

GROUP = tl.constexpr(32)  # tokens of which the greatest is looked at first
TILE = tl.constexpr(4096)  # tokens that a program looks at together
GROUPS = tl.constexpr(128)  # of a tile


@triton.jit(do_not_specialize=["tokens", "always", "recent_tokens"])
def _penalise(logits, seen, recent, penalised, tokens, vocabulary, always, recent_tokens, penalty):
    """Position t of a row lowers the tokens of ``seen`` and the first ``always`` + t of ``recent``."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    position = (tl.program_id(0) // blocks).to(tl.int64)
    row, t = position // tokens, position % tokens
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = token < vocabulary
    x = tl.load(logits[0] + row * logits[1] + t * logits[2] + token, mask=exists)
    lower = tl.load(seen + row * vocabulary + token, mask=exists, other=0) != 0
    for i in range(always + t):
        lower |= token == tl.load(recent + row * recent_tokens + i)
    x = tl.where(lower, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
    tl.store(penalised + position * vocabulary + token, x, mask=exists)


@triton.jit(do_not_specialize=["tokens"])
def _maxima(logits, maxima, tokens, vocabulary):
    """The greatest key of every group of tokens."""
    groups = tl.cdiv(vocabulary, GROUP)
    tiles = tl.cdiv(vocabulary, TILE)
    position = (tl.program_id(0) // tiles).to(tl.int64)
    group = tl.program_id(0) % tiles * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row = logits[0] + position // tokens * logits[1] + position % tokens * logits[2]
    x = tl.load(row + token, mask=token < vocabulary, other=-INFINITE)
    tl.store(maxima + position * groups + group, tl.max(key_of(x), 1), mask=group < groups)


@triton.jit
def _total(row, vocabulary, peak, temperature):
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(0, vocabulary, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row + token, mask=token < vocabulary, other=-INFINITE)
        sums += weight_of(x, peak, temperature).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["tokens", "top_k"])
def _shortlist(
    logits, maxima, verdicts, peaks, leasts, totals, counts, ids, keys, weights,
    tokens, vocabulary, temperature, top_k, nucleus, floor,
):  # fmt: skip
    """With top-k all tokens from the k-th of the groups' greatest keys on; else all but tokens so light that together
    they make no difference."""
    position = tl.program_id(0).to(tl.int64)
    row = logits[0] + position // tokens * logits[1] + position % tokens * logits[2]
    ids, keys, weights = ids + position * vocabulary, keys + position * vocabulary, weights + position * vocabulary
    groups = tl.cdiv(vocabulary, GROUP)
    maxima += position * groups
    greatest = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        greatest = tl.maximum(greatest, tl.load(maxima + group, mask=group < groups, other=0))
    peak = logit_of(tl.max(greatest, 0))
    verdict = tl.where(peak == -INFINITE, 3, tl.where((peak == INFINITE) & (top_k != 1), 2, 0))
    verdict = tl.where(peak == peak, verdict, 1)
    tl.store(verdicts + position, verdict)
    tl.store(peaks + position, peak)
    if verdict == 0:
        least = tl.full((), 0, tl.uint32)
        total = tl.full((), 0.0, tl.float64)
        lightest = floor  # that may be kept
        if top_k > 0:
            lightest = floor * 0
            least = key_of(peak)
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
                lists = (token < vocabulary) & (key_of(x) >= least) & (weight >= lightest)
                at = count + tl.cumsum(lists.to(tl.int32), 0) - 1
                tl.store(ids + at, token, mask=lists)
                tl.store(keys + at, key_of(x), mask=lists)
                tl.store(weights + at, weight, mask=lists)
                count += tl.sum(lists.to(tl.int32), 0)
        tl.store(leasts + position, least)
        tl.store(totals + position, total)
        tl.store(counts + position, count)


@dataclass
class Shortlists:
    """Of every position of logits (B, T, V)."""

    logits: torch.Tensor  # (B, T, V), penalised
    verdicts: torch.Tensor  # (B, T) int32: 0, or why there is no law; then the rest is undefined
    peaks: torch.Tensor  # (B, T): the greatest logit
    leasts: torch.Tensor  # (B, T) uint32: the least key that a listed token may have
    totals: torch.Tensor  # (B, T) float64: the sum of all weights, where top-p sees the whole vocabulary
    counts: torch.Tensor  # (B, T) int32
    ids: torch.Tensor  # (B, T, V) int32
    keys: torch.Tensor  # (B, T, V) uint32
    weights: torch.Tensor  # (B, T, V)
    filters: dict[str, float]  # as the kernels take them

    def arguments(self) -> dict[str, object]:
        """Of a kernel that takes the shortlists."""
        tensors = {name: value for name, value in vars(self).items() if name not in ("logits", "filters")}
        return {"logits": with_strides(self.logits), "vocabulary": self.logits.shape[2], **tensors, **self.filters}


def with_strides(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    return tensor, tensor.stride(0), tensor.stride(1)


def shortlists(
    logits: torch.Tensor, filters: Filters, seen: torch.Tensor | None, recent: torch.Tensor, always: int
) -> Shortlists:
    """logits (B, T, V); at position t the text is ``seen`` (B, V) and the first ``always`` + t of ``recent`` (B, R).

    Greedy is top-k 1 at any temperature.
    """
    batch, tokens, vocabulary = logits.shape
    positions = batch * tokens
    if filters.repetition_penalty != 1:
        penalised = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        launch(
            _penalise, positions * triton.cdiv(vocabulary, BLOCK.value), logits, WARPS, logits=with_strides(logits),
            seen=seen, recent=recent, penalised=penalised, tokens=tokens, vocabulary=vocabulary, always=always,
            recent_tokens=recent.shape[1], penalty=filters.repetition_penalty,
        )  # fmt: skip
        logits = penalised
    greedy = filters.greedy

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(batch, tokens, *shape, dtype=dtype, device=logits.device)

    lists = Shortlists(
        logits, new(torch.int32), new(torch.float32), new(torch.uint32), new(torch.float64), new(torch.int32),
        new(torch.int32, vocabulary), new(torch.uint32, vocabulary), new(torch.float32, vocabulary),
        {
            "temperature": 1.0 if greedy else float(filters.temperature),
            "top_k": 1 if greedy else min(filters.top_k, vocabulary),
            "nucleus": 1.0 if greedy or filters.top_p == 1 else max(filters.top_p - ROUNDING, 1e-30),
            "floor": 0.0 if greedy else filters.min_p * (1 - ROUNDING),
        },
    )  # fmt: skip
    maxima = new(torch.uint32, triton.cdiv(vocabulary, GROUP.value))
    launch(
        _maxima, positions * triton.cdiv(vocabulary, TILE.value), logits, WARPS, logits=with_strides(logits),
        maxima=maxima, tokens=tokens, vocabulary=vocabulary,
    )  # fmt: skip
    launch(_shortlist, positions, logits, WARPS, maxima=maxima, tokens=tokens, **lists.arguments())
    return lists
