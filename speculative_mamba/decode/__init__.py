"""Draft, verify, accept: the loop around a target model."""

from .cache import GenerationCache
from .drafter import Drafter, ModelDrafter
from .generate import GenerationResult, generate
from .graphs import GraphExecutor
from .ngram import NgramDrafter
from .sampling import Sampler, SamplingParams
from .stats import GenerationStats

__all__ = [
    "Drafter",
    "GenerationCache",
    "GenerationResult",
    "GenerationStats",
    "GraphExecutor",
    "ModelDrafter",
    "NgramDrafter",
    "Sampler",
    "SamplingParams",
    "generate",
]
