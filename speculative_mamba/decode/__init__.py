"""Draft, verify, accept: the loop around a target model."""

from .drafter import Drafter, ModelDrafter
from .generate import GenerationResult, generate
from .sampling import SamplingParams
from .stats import GenerationStats

__all__ = ["Drafter", "GenerationResult", "GenerationStats", "ModelDrafter", "SamplingParams", "generate"]
