"""Residual addition and RMS normalisation in one pass."""

import torch

from .. import backend as backends
from ..checks import WEIGHT_DTYPES, check, check_contiguous
from . import native, reference

_IMPLEMENTATIONS = {"cpu": native.rms_norm, "reference": reference.rms_norm}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x to the residual stream and normalises the sum (Zhang and Sennrich 2019, arXiv 1910.07467).

    | argument | shape  | dtype                       |
    |----------|--------|-----------------------------|
    | x        | (M, D) | float32                     |
    | weight   | (D)    | float32, bfloat16, float16  |
    | residual | (M, D) | float32, contiguous, or None for zero |
    | returns  | normed (M, D), new residual (M, D) | float32 |

    Equivalent to ``r = x + residual; r / sqrt(mean(r²) + eps) * weight, r``. No argument is written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix, got shape {tuple(x.shape)}")
    check("x", x, x.shape, x)
    check("weight", weight, x.shape[1:], x, WEIGHT_DTYPES)
    if residual is not None:
        check("residual", residual, x.shape, x)
        check_contiguous("residual", residual)
    return backends.run(_IMPLEMENTATIONS, backend, x)(x, weight, residual, eps)
