"""Who runs rounds: at once, or as CUDA graphs that are queued ahead of the host."""

from .base import Executor
from .cuda_graph import GraphExecutor
from .eager import EagerExecutor

__all__ = ["EagerExecutor", "Executor", "GraphExecutor", "as_executor"]


def as_executor(executor: Executor | str) -> Executor:
    """The executor of that name, for one call.

    Raises:
        ValueError: there is none of that name.
    """
    if executor == "eager":
        return EagerExecutor(max_recorded=0)
    if executor == "graph":
        return GraphExecutor(1)
    if not isinstance(executor, Executor):
        raise ValueError(f"unknown executor {executor!r}; choose from: eager, graph")
    return executor
