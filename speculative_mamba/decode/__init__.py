"""Propose, verify, accept, commit: the loop around a target model."""

from ..ops.commit_tokens import BatchState
from .batch import Batch, CommittedToken, RowTokens
from .cache import GenerationCache
from .call import GenerationResult
from .drafts import Draft, Drafter, ModelDrafter, NgramDrafter, Proposal
from .executors import EagerExecutor, GraphExecutor
from .generate import generate
from .logprobs import TokenLogprobs
from .loop import DecodeLoop
from .sampling import Sampler, SamplingParams
from .stats import GenerationStats
from .stream import stream

__all__ = [
    "Batch",
    "BatchState",
    "CommittedToken",
    "DecodeLoop",
    "Draft",
    "Drafter",
    "EagerExecutor",
    "GenerationCache",
    "GenerationResult",
    "GenerationStats",
    "GraphExecutor",
    "ModelDrafter",
    "NgramDrafter",
    "Proposal",
    "RowTokens",
    "Sampler",
    "SamplingParams",
    "TokenLogprobs",
    "generate",
    "stream",
]
