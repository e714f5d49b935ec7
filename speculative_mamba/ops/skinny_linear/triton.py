"""A program takes a tile of rows of W through all features, against a tile of rows of x; no tile depends on M.

Features are summed in lanes, of which each takes its part of every block; a lane adds up what the blocks give, and the
lanes are added in a tree. Two operands of 16 bits, an int8 weight in the dtype of x included, are multiplied on tensor
cores, all others as float32; either way sums are float32.
"""

import torch
import triton
import triton.language as tl

from ..int8 import Int8Weight
from ..triton_math import lane_sums, launch, narrow, widen
from . import SkinnyLinearArgs

ROWS = 16  # of x
OUTPUTS = 16  # rows of W: a layer of 2560 outputs has 160 programs at batch 1
LANES = 8
BYTES = 64  # of a row of x that a lane takes of a block
WARPS, STAGES = 4, 4


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x, weight, scale, bias, y, y_scale, rows, outputs, features, x_stride, weight_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, LANES: tl.constexpr, FEATURES: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS)
    m = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = (tl.program_id(0) // tiles * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    first = tl.arange(0, LANES)[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
    sums = tl.zeros((LANES, ROWS, OUTPUTS), tl.float32)
    for start in range(0, features, LANES * FEATURES):
        k = start + first
        exists = k < features
        of_x = exists[:, None, :] & (m < rows)[None, :, None]
        of_weight = exists[:, :, None] & (n < outputs)[None, None, :]
        a = tl.load(x + m[None, :, None] * x_stride + k[:, None, :], mask=of_x, other=0)
        b = tl.load(weight + n[None, None, :] * weight_stride + k[:, :, None], mask=of_weight, other=0)
        if NARROW:
            sums += tl.dot(a, b if b.dtype == a.dtype else widen(b).to(a.dtype))
        else:
            sums += tl.dot(widen(a), widen(b), input_precision="ieee")
    sums = lane_sums(sums)
    if scale is not None:
        sums *= tl.load(scale + n, mask=n < outputs, other=0)[None, :]
    sums *= y_scale
    if bias is not None:
        sums += tl.load(bias + n, mask=n < outputs, other=0)[None, :]
    here = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(y + m[:, None] * outputs + n[None, :], narrow(sums, y.dtype.element_ty), mask=here)


def skinny_linear(args: SkinnyLinearArgs) -> torch.Tensor:
    x, values, scale = args.x, args.weight, None
    if isinstance(values, Int8Weight):
        values, scale = values.values, values.scale
    rows, features = x.shape
    outputs = len(values)
    y = torch.empty(rows, outputs, dtype=args.out_dtype, device=x.device)
    launch(
        _multiply, triton.cdiv(rows, ROWS) * triton.cdiv(outputs, OUTPUTS), x, WARPS, STAGES, x=x, weight=values,
        scale=scale, bias=args.bias, y=y, y_scale=args.y_scale, rows=rows, outputs=outputs, features=features,
        x_stride=x.stride(0), weight_stride=values.stride(0), ROWS=ROWS, OUTPUTS=OUTPUTS, LANES=LANES,
        FEATURES=BYTES // x.element_size(), NARROW=x.element_size() == 2 and values.dtype in (x.dtype, torch.int8),
    )  # fmt: skip
    return y
