"""From candidates to probabilities and from probabilities to a token, in Triton and without sorting.

Candidates are, in the order of ids, tokens, the sort keys of their logits and their weights: at least all tokens that
top-k, top-p and min-p keep. A radix search finds the threshold: the smallest key that is kept and, of its equals, the
last id. Sums are float64, and one program adds all of them.
"""

import triton
import triton.language as tl

from .sampling import ROUNDING as _ROUNDING
from .sampling import SMALLEST as _SMALLEST
from .triton_math import exp, row_sums
from .triton_noise import bits_of

SMALLEST = tl.constexpr(_SMALLEST)
ROUNDING = tl.constexpr(_ROUNDING)
INFINITE = tl.constexpr(float("inf"))
BLOCK = tl.constexpr(512)  # entries of a list that a program looks at together
DIGITS = tl.constexpr(16)  # a key has eight
EVERY_ID = tl.constexpr(2**31 - 1)
LATEST = tl.constexpr(2.0**1000)  # every token arrives earlier
WARPS, REGISTERS = 8, 128


@triton.jit
def sort_key(x):
    """float32 as uint32 of the same order: zeros of both signs are equal, NaN is the greatest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(x == x, tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000), 0xFFFFFFFF)


@triton.jit
def logit_of(key):
    return tl.where(key >> 31 == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def row_sampling(sampling, b, vocabulary):
    """A row's temperature, top-k, top-p and min-p, the latter two as bounds that rounding may reach; and whether it is
    greedy, which is top-k 1 at any temperature."""
    temperature, top_p, min_p = tl.load(sampling[0] + b), tl.load(sampling[2] + b), tl.load(sampling[3] + b)
    greedy = temperature == 0
    top_k = tl.where(greedy, 1, tl.minimum(tl.load(sampling[1] + b), vocabulary))
    nucleus = tl.where(greedy | (top_p == 1), 1.0, tl.maximum(top_p.to(tl.float64) - ROUNDING, 1e-30))
    floor = tl.where(greedy, 0.0, (min_p.to(tl.float64) * (1 - ROUNDING)).to(tl.float32))
    return tl.where(greedy, 1.0, temperature), top_k, nucleus, floor, greedy


@triton.jit
def is_adjusted(penalties, bias, b):
    """Whether a row has penalties or bias."""
    adjusted = False
    if penalties is not None:
        repetition, presence, frequency = (
            tl.load(penalties[0] + b), tl.load(penalties[1] + b), tl.load(penalties[2] + b)
        )  # fmt: skip
        adjusted = (repetition != 1) | (presence != 0) | (frequency != 0)
    if bias is not None:
        adjusted = adjusted | (tl.load(bias[0] + b * bias[2]) >= 0)
    return adjusted


@triton.jit
def logits_of(logits, adjusted, penalties, bias, position, tokens, vocabulary):
    """Where the logits of a position are that count. logits: tensor and two strides; adjusted: (B, T, V), read where a
    row has penalties or bias."""
    b, t = position // tokens, position % tokens
    row = logits[0] + b * logits[1] + t * logits[2]
    if adjusted is not None:  # noqa: SIM102, as this is known when a kernel is compiled
        if is_adjusted(penalties, bias, b):
            row = adjusted + position * vocabulary
    return row


@triton.jit
def weight_of(x, peak, temperature):
    scaled = tl.div_rn(tl.where(x == peak, 0.0, x - peak), temperature)
    return tl.where(scaled > SMALLEST, exp(scaled), 0.0)


@triton.jit
def kept(token, key, weight, min_key, last, floor):
    """The weight, or 0 for tokens that are filtered."""
    return tl.where(((key > min_key) | ((key == min_key) & (token <= last))) & (weight >= floor), weight, 0.0)


@triton.jit
def listed(ids, keys, weights, start, count, min_key, last, floor):
    """A block of candidates: tokens and their weights."""
    at = start + tl.arange(0, BLOCK)
    exists = at < count
    token, key = tl.load(ids + at, mask=exists, other=0), tl.load(keys + at, mask=exists, other=0)
    return token, kept(token, key, tl.load(weights + at, mask=exists, other=0.0), min_key, last, floor)


@triton.jit
def _total(ids, keys, weights, count, min_key, last, floor):
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        _, weight = listed(ids, keys, weights, start, count, min_key, last, floor)
        sums += weight.to(tl.float64)
    return tl.sum(row_sums(tl.reshape(sums, (1, BLOCK))), 0)


@triton.jit
def _masses(keys, weights, start, count):
    """Keys of a block and what each counts for: its weight, or 1 if there are no weights."""
    at = start + tl.arange(0, BLOCK)
    exists = at < count
    mass = exists if weights is None else tl.load(weights + at, mask=exists, other=0.0)
    return tl.load(keys + at, mask=exists, other=0), mass.to(tl.float64)


@triton.jit
def search(keys, weights, count, target):
    """A key for which entries of at least that key reach ``target`` and those above it do not; the mass of those above;
    whether the target is reached exactly. The key is 0 if all entries together do not reach it.
    """
    digits = tl.arange(0, DIGITS)
    found, unit = tl.full((), 0, tl.uint32), tl.full((), 1 << 28, tl.uint32)
    above, exactly = tl.full((), 0.0, tl.float64), False
    while (unit > 0) & (exactly == 0):
        reached = tl.zeros((DIGITS,), tl.float64)
        for start in range(0, count, BLOCK):
            key, mass = _masses(keys, weights, start, count)
            counts = key[:, None] >= found + digits.to(tl.uint32)[None, :] * unit
            reached += tl.sum(tl.where(counts, mass[:, None], 0.0), 0)
        digit = tl.maximum(tl.sum((reached >= target).to(tl.int32), 0) - 1, 0)
        above = tl.where(digit == DIGITS - 1, above, tl.sum(tl.where(digits == digit + 1, reached, 0.0), 0))
        exactly = tl.sum(tl.where(digits == digit, reached, 0.0), 0) == target
        found += digit.to(tl.uint32) * unit
        unit >>= 4
    return found, above, exactly


@triton.jit
def _fewest(ids, keys, weights, count, target):
    """(min_key, last) of the fewest entries that reach ``target``, the greatest first, of equals the lowest id."""
    min_key, before, exactly = search(keys, weights, count, target)
    last = tl.full((), EVERY_ID, tl.int32)
    if exactly == 0:
        last = tl.full((), -1, tl.int32)
        for start in range(0, count, BLOCK):
            key, mass = _masses(keys, weights, start, count)
            token = tl.load(ids + start + tl.arange(0, BLOCK), mask=mass > 0, other=-1)
            mass = tl.where(key == min_key, mass, 0.0)
            needed = (mass > 0) & (before + tl.cumsum(mass, 0) - mass < target)
            last = tl.maximum(last, tl.max(tl.where(needed, token, -1), 0))
            before += tl.sum(mass, 0)
    return min_key, last


@triton.jit
def threshold(ids, keys, weights, count, min_key, total, top_k, nucleus, floor):
    """(min_key, last, scale): probabilities are weights of kept tokens · scale.

    The candidates are all tokens from the key ``min_key`` on, ``total`` is the sum over the vocabulary, needed without
    top-k only.
    """
    last = tl.full((), EVERY_ID, tl.int32)
    if (top_k > 0) & (top_k < count):
        min_key, last = _fewest(ids, keys, None, count, top_k.to(tl.float64))
    if nucleus < 1:
        if top_k > 0:
            total = _total(ids, keys, weights, count, min_key, last, 0.0)
        min_key, last = _fewest(ids, keys, weights, count, nucleus * total)
    return min_key, last, tl.div_rn(1.0, _total(ids, keys, weights, count, min_key, last, floor).to(tl.float32))


@triton.jit
def gumbel_argmax(best, winner, token, weight, seed, stream, position, purpose):
    """The winner among a block of tokens and those before it, by an exponential race: the smallest E / weight wins, of
    equals the lowest id. E = -log(1 - v) is at least v."""
    v = (bits_of(token, seed, stream, position, purpose).to(tl.float64) + 0.5) * 2.0**-32
    weight = weight.to(tl.float64)
    if tl.max((v < weight * best).to(tl.int32), 0) == 1:
        arrival = tl.where(weight > 0, -tl.log(1 - v) / tl.where(weight > 0, weight, 1.0), INFINITE)
        first = tl.min(arrival, 0)
        if first < best:
            best = first
            winner = tl.min(tl.where(arrival == first, token, EVERY_ID), 0)
    return best, winner
