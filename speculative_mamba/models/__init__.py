"""Mamba language models and their checkpoints."""

from .checkpoint import from_transformers, load_model, load_pair
from .config import ModelConfig
from .language_model import MambaLM
from .runner import RowState
from .tokenizer import encode_continuation

__all__ = ["MambaLM", "ModelConfig", "RowState", "encode_continuation", "from_transformers", "load_model", "load_pair"]
