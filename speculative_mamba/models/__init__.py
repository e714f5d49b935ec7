"""Mamba language models and their checkpoints."""

from .checkpoint import load_model
from .config import MambaConfig
from .language_model import MambaLM

__all__ = ["MambaConfig", "MambaLM", "load_model"]
