"""Linear layers of the experts that each token has chosen."""

from typing import NamedTuple

import torch

from ..backend import resolve, run
from ..checks import WEIGHT_DTYPES, check, check_activations, check_blocks, check_contiguous
from ..expert_weight import ExpertWeight
from ..library import operator


class ExpertLinearArgs(NamedTuple):
    """The arguments of ``expert_linear``, as every backend takes them."""

    x: torch.Tensor
    experts: torch.Tensor
    expert_weights: torch.Tensor | None
    weight: ExpertWeight


def _result(
    x: torch.Tensor,
    experts: torch.Tensor,
    expert_weights: torch.Tensor | None,
    weight_matrices: list[torch.Tensor],
    weight_matrix_shape: list[int] | None,
    **_: object,
) -> torch.Tensor:
    rows = experts.shape[1] if expert_weights is None else 1
    return x.new_empty(x.shape[0], rows, (weight_matrix_shape or weight_matrices[0].shape)[0])


@operator(returns=_result)
def expert_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    expert_weights: torch.Tensor | None,
    weight: ExpertWeight,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Each token's x times the matrix of each expert that the token has chosen, or the weighted sum of these products.

    | argument       | shape     | dtype                                                    |
    |----------------|-----------|----------------------------------------------------------|
    | x              | (M, J, K) | activations; J is k, or 1: the same for all of a token's experts |
    | experts        | (M, k)    | int32 in [0, E), as ``select_experts`` gives them        |
    | expert_weights | (M, k)    | float32, or None                                         |
    | weight         | (E, N, K) | `ExpertWeight` of float32, bfloat16, float16, or in blocks |
    | returns        | (M, k, N) | as x; with expert_weights (M, 1, N): the sum over a token's experts |

    Equivalent to ``y[m, j] = weight[experts[m, j]].float() @ x[m, j]`` with float32 accumulation, where x is rounded as
    ``skinny_linear`` says if weights are in blocks. Weights are used as stored. A call reads each chosen expert once,
    whatever the number of tokens that have chosen it, and no other. A token's result has the same bits for every M,
    every neighbour and every number of threads.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; weights are in blocks on a GPU; an expert that does
            not exist, on the CPU, where that is cheap to check.
    """
    if x.ndim != 3 or experts.ndim != 2:
        raise ValueError(f"x must be (M, J, K) and experts (M, k), got {tuple(x.shape)} and {tuple(experts.shape)}")
    if not isinstance(weight, ExpertWeight):
        raise ValueError(f"weight must be an ExpertWeight, got {type(weight).__name__}")
    check_activations("x", x, backend)
    tokens, top_k = experts.shape
    if x.shape[1] not in (1, top_k):
        raise ValueError(f"x must hold 1 row or {top_k} for each token, one per expert, got {x.shape[1]}")
    check("x", x, (tokens, x.shape[1], weight.shape[2]), x, x.dtype)
    check("experts", experts, (tokens, top_k), x, torch.int32)
    check_contiguous("experts", experts)
    if expert_weights is not None:
        check("expert_weights", expert_weights, (tokens, top_k), x)
        check_contiguous("expert_weights", expert_weights)
    if weight.format is None:
        check("weight", weight.matrices[0], weight.shape[1:], x, WEIGHT_DTYPES)
    else:
        check_blocks(weight[0], weight.shape[1:], x, backend)
        name = resolve(backend, x.device.type)
        if name in ("cuda", "triton"):
            raise ValueError(f"backend '{name}' has no kernels for experts in blocks; load them as bfloat16")
    if experts.is_cpu and experts.numel():
        chosen = {expert for row in experts.tolist() for expert in row}
        if min(chosen) < 0 or max(chosen) >= weight.shape[0]:
            raise ValueError(f"experts must be from 0 to {weight.shape[0] - 1}, got {sorted(chosen)}")
    return run("expert_linear", backend, ExpertLinearArgs(x, experts, expert_weights, weight))
