"""Residual addition or gate, and RMS normalisation, in one pass."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import WEIGHT_DTYPES, check, check_activations, check_contiguous
from ..library import operator


class RmsNormArgs(NamedTuple):
    """The arguments of ``rms_norm``, as every backend takes them."""

    x: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor | None
    gate: torch.Tensor | None
    groups: int
    eps: float
    x_scale: float
    constant_weights: bool


@operator(returns=lambda x, **_: (x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)))
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    gate: torch.Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    x_scale: float = 1.0,
    constant_weights: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x to the residual stream and normalises the sum (Zhang and Sennrich 2019, arXiv 1910.07467), or gates x and
    normalises the product, as Mamba-2 does before its last projection (Dao and Gu 2024, arXiv 2405.21060, section 7).

    | argument | shape  | dtype                       |
    |----------|--------|-----------------------------|
    | x        | (M, D) | activations                 |
    | weight   | (D)    | float32, bfloat16, float16  |
    | residual | (M, D) | float32, contiguous, or None for zero |
    | gate     | (M, D) | as x, or None; not together with residual |
    | groups   | int    | divides D: each of so many equal parts of D has its own mean |
    | x_scale  | float  | what x is multiplied by first, in float32 |
    | constant_weights | bool | see ``ops``; of weight |
    | returns  | normed (M, D), what was normalised (M, D) | as x, float32 |

    Equivalent to ``r = x_scale * x + residual; r / sqrt(mean(r²) + eps) * weight, r``, with a gate to the same for
    ``r = x_scale * x * silu(gate)``: first the gate, then the norm. No argument is written.

    Raises:
        ValueError: a shape, dtype, stride, device or number of groups does not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix, got shape {tuple(x.shape)}")
    check_activations("x", x, backend)
    check("weight", weight, x.shape[1:], x, WEIGHT_DTYPES)
    if residual is not None:
        check("residual", residual, x.shape, x)
        check_contiguous("residual", residual)
    if gate is not None:
        if residual is not None:
            raise ValueError("gate and residual cannot be given together: a gated norm has no residual")
        check("gate", gate, x.shape, x, x.dtype)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} features, got {groups}")
    return run("rms_norm", backend, RmsNormArgs(x, weight, residual, gate, groups, eps, x_scale, constant_weights))
