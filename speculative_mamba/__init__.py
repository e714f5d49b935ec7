"""Lossless speculative decoding for Mamba language models."""

from .decode import (
    Drafter,
    GenerationCache,
    GenerationResult,
    GenerationStats,
    GraphExecutor,
    ModelDrafter,
    NgramDrafter,
    Sampler,
    SamplingParams,
    generate,
)
from .models import MambaLM, ModelConfig, load_model, load_pair

__version__ = "0.1.0"

__all__ = [
    "Drafter",
    "GenerationCache",
    "GenerationResult",
    "GenerationStats",
    "GraphExecutor",
    "MambaLM",
    "ModelConfig",
    "ModelDrafter",
    "NgramDrafter",
    "Sampler",
    "SamplingParams",
    "generate",
    "load_model",
    "load_pair",
]
