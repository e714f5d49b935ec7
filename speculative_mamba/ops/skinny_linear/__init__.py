"""y = x Wᵀ + b for a few rows, in an order that depends on K only."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import WEIGHT_DTYPES, check, check_activations, check_contiguous
from ..int8 import Int8Weight
from ..library import operator


class SkinnyLinearArgs(NamedTuple):
    """The arguments of ``skinny_linear``, as every backend takes them."""

    x: torch.Tensor
    weight: torch.Tensor | Int8Weight
    bias: torch.Tensor | None
    y_scale: float
    out_dtype: torch.dtype
    constant_weights: bool


def _result(
    x: torch.Tensor, weight: torch.Tensor | None, weight_values: torch.Tensor | None, out_dtype: torch.dtype | None, **_
) -> torch.Tensor:
    matrix = weight_values if weight is None else weight
    return x.new_empty(x.shape[0], matrix.shape[0], dtype=out_dtype or x.dtype)


@operator(returns=_result)
def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    bias: torch.Tensor | None = None,
    *,
    y_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    constant_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Linear layer for the few rows of a decode step.

    | argument  | shape  | dtype                                    |
    |-----------|--------|------------------------------------------|
    | x         | (M, K) | activations                              |
    | weight    | (N, K) | float32, bfloat16, float16, `Int8Weight` |
    | bias      | (N)    | float32, None                            |
    | y_scale   | float  | what finished sums are multiplied by, before the bias |
    | out_dtype |        | float32, or None: as x                   |
    | constant_weights | | bool, see ``ops``; of weight, bias       |
    | returns   | (M, N) | out_dtype                                |

    Equivalent to ``torch.nn.functional.linear(x, weight.float(), bias)`` with float32 accumulation; for an
    ``Int8Weight``, with ``weight.values``, and the sums times ``weight.scale``: x is not rounded. The bias is added to
    the finished sum. The weight is used as stored, row-major, with no copy. On all backends but ``reference`` row m of
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
    if isinstance(weight, Int8Weight):
        check("weight.values", weight.values, shape, x, torch.int8)
        check("weight.scale", weight.scale, shape[:1], x)
    else:
        check("weight", weight, shape, x, WEIGHT_DTYPES)
    if bias is not None:
        check("bias", bias, shape[:1], x)
        check_contiguous("bias", bias)
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"out_dtype must be torch.float32 or that of x, {x.dtype}, got {out_dtype}")
    args = SkinnyLinearArgs(x, weight, bias, y_scale, out_dtype or x.dtype, constant_weights)
    return run("skinny_linear", backend, args)
