"""Mamba language models and their checkpoints."""

from .checkpoint import load_model, load_pair
from .config import ModelConfig
from .language_model import MambaLM

__all__ = ["MambaLM", "ModelConfig", "load_model", "load_pair"]
