"""A program takes a tile of rows of W through all features, against a tile of rows of x; no tile depends on M.

Features are summed in lanes, of which each takes its part of every step; a lane adds up what the steps give, and the
lanes are added in a tree. Two operands of 16 bits are multiplied on tensor cores, all others as float32; either way
sums are float32. Of a weight in blocks a lane's part is a block: integers in the dtype of x, their sum times the scale.
"""

import torch
import triton
import triton.language as tl

from ..block_formats import BLOCK
from ..block_weight import BlockWeight
from ..triton_math import lane_sums, launch, narrow, widen
from . import SkinnyLinearArgs

ROWS = 16  # of x
OUTPUTS = 16  # rows of W: a layer of 2560 outputs has 160 programs at batch 1; a group of a weight in blocks
LANES = 8
BYTES = 64  # of a row of x that a lane takes of a block
WARPS, STAGES = 4, 4


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x, weight, scales, bias, y, y_scale, rows, outputs, features, x_stride, weight_stride, quants_at,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, LANES: tl.constexpr, FEATURES: tl.constexpr, NARROW: tl.constexpr,
    BITS: tl.constexpr,
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
        if BITS == 0:
            b = tl.load(weight + n[None, None, :] * weight_stride + k[:, :, None], mask=of_weight, other=0)
        else:
            b = _quants(weight, n, k, of_weight, weight_stride, quants_at, BITS, OUTPUTS)
        products = tl.dot(a, b.to(a.dtype)) if NARROW else tl.dot(widen(a), widen(b), input_precision="ieee")
        if BITS != 0:
            products *= _scales(scales, n, start // FEATURES, features // FEATURES, weight_stride // 2, LANES, OUTPUTS)
        sums += products
    sums = lane_sums(sums) * y_scale
    if bias is not None:
        sums += tl.load(bias + n, mask=n < outputs, other=0)[None, :]
    here = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(y + m[:, None] * outputs + n[None, :], narrow(sums, y.dtype.element_ty), mask=here)


@triton.jit
def _quants(weight, n, k, exists, group_stride, quants_at, BITS: tl.constexpr, GROUP: tl.constexpr):
    """(LANES, FEATURES, OUTPUTS) float32 of blocks of 32 features; ``block_formats`` says how they lie."""
    block, feature = k // 32, k % 32
    if BITS == 8:
        at = block * (32 * GROUP) + feature // 4 * (4 * GROUP) + feature % 4
    else:
        at = block * (16 * GROUP) + feature % 16 // 4 * (4 * GROUP) + feature % 4
    in_group = n // GROUP * group_stride + quants_at + n % GROUP * 4
    bits = tl.load(weight + in_group[None, None, :] + at[:, :, None], mask=exists, other=0).to(tl.int32)
    if BITS == 8:
        return (bits - 128).to(tl.float32)
    return ((bits >> (feature // 16 * 4)[:, :, None] & 15) - 8).to(tl.float32)


@triton.jit
def _scales(scales, n, first, blocks, group_stride, LANES: tl.constexpr, GROUP: tl.constexpr):
    """(LANES, 1, OUTPUTS) float32."""
    block = first + tl.arange(0, LANES)
    at = (n // GROUP * group_stride + n % GROUP)[None, :] + block[:, None] * GROUP
    return widen(tl.load(scales + at, mask=(block < blocks)[:, None], other=0))[:, None, :]


def skinny_linear(args: SkinnyLinearArgs) -> torch.Tensor:
    x, weight, scales, bits, quants_at = args.x, args.weight, None, 0, 0
    rows, features = x.shape
    outputs = weight.shape[0]
    step = BYTES // x.element_size()
    if isinstance(weight, BlockWeight):
        bits, step, quants_at = 8 if weight.format == "q8_0" else 4, BLOCK, weight.dtype.quants_at(features)
        weight = weight.data
        scales = weight.view(torch.float16)
    y = torch.empty(rows, outputs, dtype=args.out_dtype, device=x.device)
    launch(
        _multiply, triton.cdiv(rows, ROWS) * triton.cdiv(outputs, OUTPUTS), x, WARPS, STAGES, x=x, weight=weight,
        scales=scales, bias=args.bias, y=y, y_scale=args.y_scale, rows=rows, outputs=outputs, features=features,
        x_stride=x.stride(0), weight_stride=weight.stride(0), quants_at=quants_at, ROWS=ROWS, OUTPUTS=OUTPUTS,
        LANES=LANES, FEATURES=step, NARROW=x.element_size() == 2 and (bits > 0 or weight.dtype == x.dtype), BITS=bits,
    )  # fmt: skip
    return y
