"""Lossless speculative decoding for Mamba language models."""

from .decode import Drafter, GenerationResult, GenerationStats, SamplingParams, generate
from .models import MambaConfig, MambaLM, load_model

__version__ = "0.1.0"

__all__ = [
    "Drafter",
    "GenerationResult",
    "GenerationStats",
    "MambaConfig",
    "MambaLM",
    "SamplingParams",
    "generate",
    "load_model",
]
