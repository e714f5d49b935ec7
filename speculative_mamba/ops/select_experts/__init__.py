"""Which experts a token goes to, and how much each counts."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import check
from ..library import operator

SCORES = ("softmax", "sigmoid")  # kernels know them by their place
MAX_EXPERTS = 1024


class SelectExpertsArgs(NamedTuple):
    """The arguments of ``select_experts``, as every backend takes them."""

    logits: torch.Tensor
    bias: torch.Tensor | None
    top_k: int
    score: int
    groups: int
    top_k_groups: int
    normalize: bool
    epsilon: float
    scale: float


def _results(logits: torch.Tensor, top_k: int, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits.shape[0], top_k
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


@operator(returns=_results)
def select_experts(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    groups: int = 1,
    top_k_groups: int = 1,
    normalize: bool = True,
    epsilon: float = 0.0,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router of a mixture of experts.

    | argument     | shape  | dtype                                                     |
    |--------------|--------|-----------------------------------------------------------|
    | logits       | (M, E) | float32                                                   |
    | bias         | (E)    | float32 or None; added to the scores to choose, not to weigh |
    | top_k        | int    | experts of a token                                        |
    | score        | str    | "softmax" or "sigmoid" of the logits                      |
    | groups, top_k_groups | int | experts come from the best so many of equal groups of neighbours |
    | normalize    | bool   | weights are divided by their sum plus ``epsilon``         |
    | scale        | float  | what weights are multiplied by last                       |
    | returns      | (M, k) | float32: weights, the best expert's first                 |
    |              | (M, k) | int32: experts                                            |

    A group is as good as the sum of its two best scores plus bias. Without bias and groups equivalent to
    ``weights, experts = softmax(logits).topk(k)``, then ``scale * weights / weights.sum()``. Softmax over the chosen
    logits alone (Granite, Mixtral) is softmax with ``normalize``; Jamba's router is softmax without; sigmoid with bias
    and groups is that of DeepSeek-V3 (arXiv 2412.19437) and Nemotron 3. Among equals the lower expert wins; a NaN comes
    before all numbers. A row's result has the same bits for every M.

    Raises:
        ValueError: a shape, dtype or device does not fit, or numbers of experts and groups do not.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be a matrix, got shape {tuple(logits.shape)}")
    experts = logits.shape[1]
    check("logits", logits, logits.shape, logits)
    if bias is not None:
        check("bias", bias, (experts,), logits)
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    check_routing(experts, top_k, groups, top_k_groups)
    args = SelectExpertsArgs(
        logits, bias, top_k, SCORES.index(score), groups, top_k_groups, normalize, epsilon, scale
    )  # fmt: skip
    return run("select_experts", backend, args)


def check_routing(experts: int, top_k: int, groups: int, top_k_groups: int) -> None:
    """
    Raises:
        ValueError: these numbers do not fit together.
    """
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"there must be 1 to {MAX_EXPERTS} experts, got {experts}")
    if not 1 <= groups <= experts or experts % groups or (groups > 1 and experts // groups < 2):
        raise ValueError(f"{experts} experts cannot be {groups} equal groups of at least two")
    if not 1 <= top_k_groups <= groups:
        raise ValueError(f"top_k_groups must be from 1 to {groups}, the number of groups, got {top_k_groups}")
    if not 1 <= top_k <= experts // groups * top_k_groups:
        raise ValueError(
            f"top_k must be from 1 to {experts // groups * top_k_groups}, the experts to choose from, got {top_k}"
        )
