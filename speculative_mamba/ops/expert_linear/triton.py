"""A program takes a tile of rows of one expert's matrix, for all tokens that have chosen this expert.

Programs are of an expert each, or where choices are fewer, of a choice: then the first choice of an expert serves all.
Features are summed as in ``skinny_linear``. Weighted, a second kernel adds the products in the order of a token's
choices.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import lane_sums, launch, narrow, widen
from . import ExpertLinearArgs

ROWS = 16  # choices that are multiplied at a time
OUTPUTS = 16  # rows of W
SEARCHED = 64  # choices that are looked at a time
LANES = 8
BYTES = 64  # of a row of x that a lane takes of a block
WARPS, STAGES = 8, 3
COMBINED = 512  # outputs of a program of the second kernel


@triton.jit
def _count(experts, expert, end, SEARCHED: tl.constexpr):
    """How many of the first ``end`` choices are of an expert."""
    count = 0
    for start in range(0, end, SEARCHED):
        at = start + tl.arange(0, SEARCHED)
        count += tl.sum((tl.load(experts + at, mask=at < end, other=-1) == expert).to(tl.int32), axis=0)
    return count


@triton.jit
def _find(experts, choices, expert, first, ROWS: tl.constexpr, SEARCHED: tl.constexpr):
    """Choices number first, first+1, … of an expert; -1 behind the last."""
    wanted = first + tl.arange(0, ROWS)
    found = tl.full((ROWS,), -1, tl.int32)
    seen = 0
    for start in range(0, choices, SEARCHED):
        at = start + tl.arange(0, SEARCHED)
        hit = (tl.load(experts + at, mask=at < choices, other=-1) == expert).to(tl.int32)
        number = seen + tl.cumsum(hit, axis=0) - 1
        here = (number[None, :] == wanted[:, None]) & (hit == 1)[None, :]
        found = tl.maximum(found, tl.max(tl.where(here, at[None, :], -1), axis=1))
        seen += tl.sum(hit, axis=0)
    return found


@triton.jit(do_not_specialize=["choices"])
def _multiply(
    x, experts, weight, offsets, y, choices, top_k, outputs, features, x_token_stride, x_input_stride, weight_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, LANES: tl.constexpr, FEATURES: tl.constexpr, SEARCHED: tl.constexpr,
    BY_CHOICE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(outputs, OUTPUTS)
    owner = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    expert = owner
    count = 0
    if BY_CHOICE:
        expert = tl.load(experts + owner)
        if _count(experts, expert, owner, SEARCHED) == 0:
            count = _count(experts, expert, choices, SEARCHED)
    else:
        count = _count(experts, expert, choices, SEARCHED)
    matrix = weight + tl.load(offsets + expert)
    lanes = tl.arange(0, LANES)[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
    for first in range(0, count, ROWS):
        choice = _find(experts, choices, expert, first, ROWS, SEARCHED)
        here = choice >= 0
        token = (tl.where(here, choice, 0) // top_k).to(tl.int64)
        row = x + token * x_token_stride + (tl.where(here, choice, 0) % top_k).to(tl.int64) * x_input_stride
        sums = tl.zeros((LANES, ROWS, OUTPUTS), tl.float32)
        for start in range(0, features, LANES * FEATURES):
            k = start + lanes
            exists = k < features
            of_x = exists[:, None, :] & here[None, :, None]
            of_weight = exists[:, :, None] & (n < outputs)[None, None, :]
            a = tl.load(row[None, :, None] + k[:, None, :], mask=of_x, other=0)
            b = tl.load(matrix + n[None, None, :] * weight_stride + k[:, :, None], mask=of_weight, other=0)
            if NARROW:
                sums += tl.dot(a, b)
            else:
                sums += tl.dot(widen(a), widen(b), input_precision="ieee")
        to = y + tl.where(here, choice, 0).to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(to, narrow(lane_sums(sums), y.dtype.element_ty), mask=here[:, None] & (n < outputs)[None, :])


@triton.jit
def _combine(products, expert_weights, y, top_k, outputs, BLOCK: tl.constexpr):
    blocks = tl.cdiv(outputs, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(top_k):
        i = token * top_k + choice
        total += tl.load(expert_weights + i) * tl.load(products + i * outputs + n, mask=n < outputs, other=0)
    tl.store(y + token * outputs + n, narrow(total, y.dtype.element_ty), mask=n < outputs)


def expert_linear(args: ExpertLinearArgs) -> torch.Tensor:
    x, weight, (tokens, top_k) = args.x, args.weight, args.experts.shape
    num_experts, outputs, features = weight.shape
    choices, weighted = tokens * top_k, args.expert_weights is not None
    products = torch.empty(tokens, top_k, outputs, dtype=torch.float32 if weighted else x.dtype, device=x.device)
    launch(
        _multiply, min(choices, num_experts) * triton.cdiv(outputs, OUTPUTS), x, WARPS, STAGES, x=x,
        experts=args.experts, weight=weight.matrices[0], offsets=weight.offsets, y=products, choices=choices,
        top_k=top_k, outputs=outputs, features=features, x_token_stride=x.stride(0),
        x_input_stride=0 if x.shape[1] == 1 else x.stride(1), weight_stride=weight.matrices[0].stride(0), ROWS=ROWS,
        OUTPUTS=OUTPUTS, LANES=LANES, FEATURES=BYTES // x.element_size(), SEARCHED=SEARCHED,
        BY_CHOICE=choices < num_experts, NARROW=x.element_size() == 2 and weight.dtype is x.dtype,
    )  # fmt: skip
    if not weighted:
        return products
    y = x.new_empty(tokens, 1, outputs)
    launch(
        _combine, tokens * triton.cdiv(outputs, COMBINED), x, 4, products=products, expert_weights=args.expert_weights,
        y=y, top_k=top_k, outputs=outputs, BLOCK=COMBINED,
    )  # fmt: skip
    return y
