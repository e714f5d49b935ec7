"""Mamba language models and their checkpoints."""

from .checkpoint import load_model, load_pair
from .config import ModelConfig
from .language_model import MambaLM
from .tokenizer import encode_continuation

__all__ = ["MambaLM", "ModelConfig", "encode_continuation", "load_model", "load_pair"]
