"""Lossless speculative decoding for Mamba language models."""

from .decode import (
    Drafter,
    GenerationCache,
    GenerationResult,
    GenerationStats,
    Sampler,
    SamplingParams,
    generate,
)
from .models import MambaConfig, MambaLM, load_model

__version__ = "0.1.0"

__all__ = [
    "Drafter",
    "GenerationCache",
    "GenerationResult",
    "GenerationStats",
    "MambaConfig",
    "MambaLM",
    "Sampler",
    "SamplingParams",
    "generate",
    "load_model",
]
