"""A program takes a tile of rows of W through all features, against a tile of rows of x; no tile depends on M.

Two operands of 16 bits, int8 values widened to x's dtype included, are multiplied on tensor cores; all others as
float32. Either way products are exact to float32 and sums are float32.
"""

import torch
import triton
import triton.language as tl

from ..int8 import Int8Weight
from ..triton_math import launch, narrow, widen

ROWS = 16  # of x
OUTPUTS = 16  # rows of W: a layer of 2560 outputs has 160 programs at batch 1
BYTES = 512  # of a row of x at a time
WARPS, STAGES = 4, 4
# The interpreter multiplies the bits of bfloat16 as integers.
TENSOR_CORES = (torch.float16,) if triton.knobs.runtime.interpret else (torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x, weight, scale, bias, y, rows, outputs, features, x_stride, weight_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, FEATURES: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS)
    m = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    n = (tl.program_id(0) // tiles * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)[None, :]
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, features, FEATURES):
        k = start + tl.arange(0, FEATURES)
        a = tl.load(x + m * x_stride + k[None, :], mask=(m < rows) & (k < features)[None, :], other=0)
        b = tl.load(weight + n * weight_stride + k[:, None], mask=(n < outputs) & (k < features)[:, None], other=0)
        if NARROW:
            sums = tl.dot(a, b.to(a.dtype), sums)
        else:
            sums = tl.dot(widen(a), widen(b), sums, input_precision="ieee")
    if scale is not None:
        sums *= tl.load(scale + n, mask=n < outputs, other=0)
    if bias is not None:
        sums += tl.load(bias + n, mask=n < outputs, other=0)
    tl.store(y + m * outputs + n, narrow(sums, y.dtype.element_ty), mask=(m < rows) & (n < outputs))


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor | Int8Weight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    rows, features = x.shape
    outputs = weight.shape[0]
    values, scale = (weight.values, weight.scale) if isinstance(weight, Int8Weight) else (weight, None)
    y = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    launch(
        _multiply, triton.cdiv(rows, ROWS) * triton.cdiv(outputs, OUTPUTS), x, WARPS, stages=STAGES, x=x,
        weight=values, scale=scale, bias=bias, y=y, rows=rows, outputs=outputs, features=features,
        x_stride=x.stride(0), weight_stride=values.stride(0), ROWS=ROWS, OUTPUTS=OUTPUTS, FEATURES=BYTES // x.element_size(),
        NARROW=x.dtype in TENSOR_CORES and values.dtype in (x.dtype, torch.int8),
    )  # fmt: skip
    return y
