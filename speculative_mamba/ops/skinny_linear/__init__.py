"""y = x Wᵀ + b for a few rows, in an order that depends on K only."""

from typing import NamedTuple

import torch

from ..backend import run
from ..block_weight import BlockWeight
from ..checks import WEIGHT_DTYPES, check, check_activations, check_blocks, check_contiguous


class SkinnyLinearArgs(NamedTuple):
    """The arguments of ``skinny_linear``, as every backend takes them."""

    x: torch.Tensor
    weight: torch.Tensor | BlockWeight
    bias: torch.Tensor | None
    y_scale: float
    out_dtype: torch.dtype
    constant_weights: bool


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor | BlockWeight,
    bias: torch.Tensor | None = None,
    *,
    y_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    constant_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Linear layer for the few rows of a decode step.

    | argument  | shape  | dtype                                     |
    |-----------|--------|-------------------------------------------|
    | x         | (M, K) | activations                               |
    | weight    | (N, K) | float32, bfloat16, float16, `BlockWeight` |
    | bias      | (N)    | float32, None                             |
    | y_scale   | float  | what finished sums are multiplied by, before the bias |
    | out_dtype |        | float32, or None: as x                   |
    | constant_weights | | bool, see ``ops``; of weight, bias       |
    | returns   | (M, N) | out_dtype                                |

    Equivalent to ``torch.nn.functional.linear(x, weight.float(), bias)`` with float32 accumulation; for a
    ``BlockWeight``, with ``weight.dequantized()``. On the CPU x is then rounded first: each 32 features of a row to 24
    bits, as many as float32 has for the largest of them; infinities become NaN. The bias is added to the finished sum.
    The weight is used as it lies, with no copy. On all backends but ``reference`` row m of
    the result has the same bits for every M, every neighbour and every number of threads, which
    ``torch.nn.functional.linear`` does not promise; this is what makes verifying T tokens in one call equal to T calls
    of one token.

    Any M works; the time grows slowly up to M ≈ 8, while reading the weight dominates.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if x.ndim != 2 or len(weight.shape) != 2:
        raise ValueError(f"x and weight must be matrices, got shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    check_activations("x", x, backend)
    shape = weight.shape[0], x.shape[1]
    if isinstance(weight, BlockWeight):
        check_blocks(weight, shape, x, backend)
    else:
        check("weight", weight, shape, x, WEIGHT_DTYPES)
    if bias is not None:
        check("bias", bias, shape[:1], x)
        check_contiguous("bias", bias)
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"out_dtype must be torch.float32 or that of x, {x.dtype}, got {out_dtype}")
    args = SkinnyLinearArgs(x, weight, bias, y_scale, out_dtype or x.dtype, constant_weights)
    return run("skinny_linear", backend, args)
