"""Who runs rounds: at once, or as CUDA graphs that are queued ahead of the host."""

from ...models.identity import backend_of
from ..drafts import Draft, PythonDraft
from ..drafts.base import LanguageModel
from .base import Executor
from .cuda_graph import GraphExecutor
from .eager import EagerExecutor

__all__ = ["EagerExecutor", "Executor", "GraphExecutor", "as_executor", "check_can_be_captured"]


def as_executor(executor: Executor | str) -> Executor:
    """The executor of that name, for one call.

    Raises:
        ValueError: there is none of that name.
    """
    if executor == "eager":
        return EagerExecutor()
    if executor == "graph":
        return GraphExecutor(1)
    if not isinstance(executor, Executor):
        raise ValueError(f"unknown executor {executor!r}; choose from: eager, graph")
    return executor


def check_can_be_captured(executor: Executor, target: LanguageModel, draft: Draft | None, processor: object) -> None:
    """What an executor that captures rounds cannot run.

    Raises:
        ValueError: models on the wrong device or backend, or Python within a round.
    """
    if isinstance(executor, GraphExecutor) and target.device.type != executor.device_type:
        raise ValueError(f"executor 'graph' needs a CUDA device, and the model is on {target.device}; use 'eager'")
    models = [target, *([draft.model] if draft is not None and draft.model is not None else [])]
    if target.device.type == "cuda" and "reference" in map(backend_of, models):
        raise ValueError("executor 'graph' needs backend cuda or triton; 'reference' reads values on the host")
    if processor is not None:
        raise ValueError("a logits_processor is Python and cannot be in a CUDA graph; use executor='eager'")
    if draft is not None and not draft.capturable:
        name = type(draft.drafter if isinstance(draft, PythonDraft) else draft).__name__
        raise ValueError(f"the drafter {name} is Python and cannot be in a CUDA graph; use executor='eager'")
