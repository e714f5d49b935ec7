"""The gate of an MLP."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import check, check_activations


class GatedSiluArgs(NamedTuple):
    """The arguments of ``gated_silu``, as every backend takes them."""

    gate: torch.Tensor
    up: torch.Tensor


def gated_silu(gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

    | argument | shape  | dtype                                    |
    |----------|--------|------------------------------------------|
    | gate, up | (M, I) | activations, contiguous in their last dimension |
    | returns  | (M, I) | as gate                                  |

    Equivalent to ``torch.nn.functional.silu(gate) * up``; a value has the same bits wherever it lies, which PyTorch
    does not promise. No argument is written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if gate.ndim != 2:
        raise ValueError(f"gate must be a matrix, got shape {tuple(gate.shape)}")
    check_activations("gate", gate, backend)
    check("up", up, gate.shape, gate, gate.dtype)
    return run("gated_silu", backend, GatedSiluArgs(gate, up))
