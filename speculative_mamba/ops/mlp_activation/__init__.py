"""What an MLP does between its matrices."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import check, check_activations
from ..library import operator

ACTIVATIONS = ("silu", "relu2")  # kernels know them by their place


class MlpActivationArgs(NamedTuple):
    """The arguments of ``mlp_activation``, as every backend takes them."""

    gate: torch.Tensor
    up: torch.Tensor | None
    activation: int


@operator(returns=lambda gate, **_: gate.new_empty(gate.shape))
def mlp_activation(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, activation: str = "silu", backend: str = "auto"
) -> torch.Tensor:
    """act(gate) * up (Shazeer 2020, arXiv 2002.05202), or act(gate) alone.

    | argument | shape  | dtype                                    |
    |----------|--------|------------------------------------------|
    | gate     | (M, I) | activations, contiguous in its last dimension |
    | up       | (M, I) | as gate, or None for one                 |
    | activation | str  | "silu", or "relu2": the square of what is positive |
    | returns  | (M, I) | as gate                                  |

    Equivalent to ``torch.nn.functional.silu(gate) * up``, or ``torch.relu(gate) ** 2 * up``; a value has the same bits
    wherever it lies, which PyTorch does not promise. No argument is written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or the activation is another.
    """
    if gate.ndim != 2:
        raise ValueError(f"gate must be a matrix, got shape {tuple(gate.shape)}")
    check_activations("gate", gate, backend)
    if up is not None:
        check("up", up, gate.shape, gate, gate.dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return run("mlp_activation", backend, MlpActivationArgs(gate, up, ACTIVATIONS.index(activation)))
