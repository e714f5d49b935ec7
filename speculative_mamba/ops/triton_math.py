"""What Triton kernels share: conversions, math, sums in a fixed order, launches.

The interpreter, on which tests run the kernels without a GPU, cuts bfloat16 off instead of rounding it, so conversions
work on bits. Multiply-adds are fused only where a kernel says ``tl.fma``, and a sum is a tree of additions of two
numbers: a result is a function of the values alone, whatever layout or vector width the compiler chooses.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # few bits: its product with a whole number is exact
LN_2_LOW = tl.constexpr(-2.12194440054690583e-4)
TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 · 2²³: what is added to it loses its fraction
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def widen(value):
    """As float32."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 in another dtype: to nearest, ties to even; NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def exp(x):
    """e^x to about one unit in the last place: a Taylor series within ln 2 / 2 of 0, times a whole power of two.

    ``tl.exp`` loses as many units as x is large, ``tl.exp2`` more than one on a GPU.
    """
    x = tl.minimum(tl.maximum(x, -104.0, propagate_nan=ALL), 89.0, propagate_nan=ALL)
    shifted = x * LOG2_E + TO_WHOLE
    whole = shifted - TO_WHOLE
    rest = tl.fma(whole, -LN_2_LOW, tl.fma(whole, -LN_2_HIGH, x))
    series = tl.fma(rest, 1 / 5040, 1 / 720)
    series = tl.fma(rest, series, 1 / 120)
    series = tl.fma(rest, series, 1 / 24)
    series = tl.fma(rest, series, 1 / 6)
    series = tl.fma(rest, series, 0.5)
    series = tl.fma(rest, series, 1.0)
    series = tl.fma(rest, series, 1.0)
    power = shifted.to(tl.int32, bitcast=True) - tl.full((), TO_WHOLE, tl.float32).to(tl.int32, bitcast=True)
    half = power >> 1  # in two factors, as the result may be less than the least normal number
    return series * _power_of_2(half) * _power_of_2(power - half)


@triton.jit
def _power_of_2(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def silu(x):
    return tl.div_rn(x, 1.0 + exp(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x), accurate for the smallest results too: log(1 + u) is 2 artanh(u / (2 + u))."""
    u = exp(-tl.abs(x))
    v = tl.div_rn(u, 2.0 + u)
    series = 1 / 13
    for k in tl.static_range(5, -1, -1):
        series = tl.fma(v * v, series, 1 / (2 * k + 1))
    return tl.maximum(x, 0.0, propagate_nan=ALL) + 2.0 * v * series


@triton.jit
def row_sums(values):
    """(M, N) → (M): neighbours are added until one is left. N is a power of two."""
    for _ in tl.static_range(31):
        if values.shape[1] > 1:
            values = tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)), axis=2)
    return tl.reshape(values, (values.shape[0],))


@triton.jit
def lane_sums(values):
    """(L, M, N) → (M, N), in the order of ``row_sums``."""
    m: tl.constexpr = values.shape[1]
    n: tl.constexpr = values.shape[2]
    values = tl.reshape(tl.permute(values, (1, 2, 0)), (m * n, values.shape[0]))
    return tl.reshape(row_sums(values), (m, n))


def launch(
    kernel: triton.JITFunction, programs: int, like: torch.Tensor, warps: int, stages: int = 1, **arguments: object
) -> None:
    """Runs a kernel on the device of ``like``."""
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
