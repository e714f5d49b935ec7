"""Residual addition or gate, and RMS normalisation in Triton."""

import torch
import triton
import triton.language as tl

from ..triton_math import launch, narrow, row_sums, silu, widen
from . import RmsNormArgs

LARGEST_BLOCK = 2048


@triton.jit
def _value(x, x_scale, residual, gate, at, exists):
    """What is normalised."""
    value = widen(tl.load(x + at, exists, 0.0))
    if residual is not None:
        value = tl.fma(value, x_scale, tl.load(residual + at, exists, 0.0))
    else:
        value *= x_scale
    if gate is not None:
        value *= silu(widen(tl.load(gate + at, exists, 0.0)))
    return value


@triton.jit
def _normalise(
    x, x_row_stride, x_scale, residual, gate, gate_row_stride, weight, eps, y, residual_out, groups, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes one group of one row; in which order it adds depends on the group's size alone."""
    row, first = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups * size
    x += row * x_row_stride + first
    residual_out += row * (groups * size) + first
    y += row * (groups * size) + first
    weight += first
    if residual is not None:
        residual += row * (groups * size) + first
    if gate is not None:
        gate += row * gate_row_stride + first

    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        value = _value(x, x_scale, residual, gate, at, at < size)
        tl.store(residual_out + at, value, at < size)
        squares = tl.fma(value, value, squares)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(row_sums(squares), tl.cast(size, tl.float32)) + eps))
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        # Again: other threads wrote what this one would read back.
        value = _value(x, x_scale, residual, gate, at, at < size)
        value = value * scale[:, None] * widen(tl.load(weight + at, at < size, 0.0))
        tl.store(y + at, narrow(value, y.dtype.element_ty), at < size)


def rms_norm(args: RmsNormArgs) -> tuple[torch.Tensor, torch.Tensor]:
    x, gate, groups = args.x, args.gate, args.groups
    rows, features = x.shape
    size = features // groups
    y, residual_out = x.new_empty(rows, features), x.new_empty(rows, features, dtype=torch.float32)
    launch(
        _normalise, rows * groups, y, 8, x=x, x_row_stride=x.stride(0), x_scale=args.x_scale, residual=args.residual,
        gate=gate, gate_row_stride=0 if gate is None else gate.stride(0), weight=args.weight, eps=args.eps, y=y,
        residual_out=residual_out, groups=groups, size=size, BLOCK=min(LARGEST_BLOCK, triton.next_power_of_2(size)),
    )  # fmt: skip
    return y, residual_out
