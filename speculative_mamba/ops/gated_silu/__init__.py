"""The gate of an MLP."""

import torch

from .. import backend as backends
from ..checks import check
from . import native, reference

_IMPLEMENTATIONS = {"cpu": native.gated_silu, "reference": reference.gated_silu}


def gated_silu(gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

    | argument | shape  | dtype                                    |
    |----------|--------|------------------------------------------|
    | gate, up | (M, I) | float32, contiguous in their last dimension |
    | returns  | (M, I) | float32                                  |

    Equivalent to ``torch.nn.functional.silu(gate) * up``; a value has the same bits wherever it lies, which PyTorch
    does not promise. No argument is written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if gate.ndim != 2:
        raise ValueError(f"gate must be a matrix, got shape {tuple(gate.shape)}")
    check("gate", gate, gate.shape, gate)
    check("up", up, gate.shape, gate)
    return backends.run(_IMPLEMENTATIONS, backend, gate)(gate, up)
