"""The public checkpoint formats: what a config means, and under which names the weights lie."""

from .names import Names
from .recognise import parse_config

__all__ = ["Names", "parse_config"]
