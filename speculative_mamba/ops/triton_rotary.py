"""Rotary embedding in Triton."""

import triton
import triton.language as tl

from .triton_math import widen

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def _series(square, ODD: tl.constexpr):
    """cos r, or with ODD sin r / r, from r² for |r| <= π/4: Taylor's five terms after the first."""
    total = 1.0
    for i in tl.static_range(5, 0, -1):
        total = tl.fma(square * total, -1 / ((2 * i - 1 + ODD) * (2 * i + ODD)), 1.0)
    return total


@triton.jit
def sin_cos(angle):
    """Of float32 numbers below 2²⁰ or so: a quarter turn is taken off in float64. CUDA's own need a stack for more."""
    quarter = tl.floor(angle.to(tl.float64) * TWO_OVER_PI + 0.5)
    rest = (angle.to(tl.float64) - quarter * HALF_PI).to(tl.float32)
    quarter = quarter.to(tl.int64) & 3
    sin, cos = rest * _series(rest * rest, 1), _series(rest * rest, 0)
    odd = (quarter & 1) == 1
    return (
        tl.where(odd, cos, sin) * tl.where(quarter >= 2, -1.0, 1.0),
        tl.where(odd, sin, cos) * tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0),
    )


@triton.jit
def rotated(x, exists, position, inv_freq, pairs, BLOCK: tl.constexpr):
    """Heads (M, BLOCK) as float32 from pointers x (M) to their first dimensions, their first 2 · ``pairs`` dimensions
    turned as pairs (i, i + pairs)."""
    d = tl.arange(0, BLOCK)[None, :]
    head = widen(tl.load(x[:, None] + d, mask=exists, other=0.0))
    if inv_freq is not None:
        turned = exists & (d < 2 * pairs)
        partner = widen(tl.load(x[:, None] + tl.where(d < pairs, d + pairs, d - pairs), mask=turned, other=0.0))
        frequency = tl.load(inv_freq + tl.where(d < pairs, d, d - pairs), mask=d < 2 * pairs, other=0.0)
        sin, cos = sin_cos(position[:, None].to(tl.float32) * frequency)
        head = tl.where(turned, head * cos + partner * tl.where(d < pairs, -sin, sin), head)
    return head
