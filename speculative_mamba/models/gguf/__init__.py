"""Models in the files of llama.cpp."""

from .file import GgufFile
from .header import MAGIC

__all__ = ["MAGIC", "GgufFile"]
