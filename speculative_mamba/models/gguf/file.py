"""A GGUF file: a model's configuration, tokenizer and weights in one."""

from dataclasses import dataclass
from pathlib import Path

from ..files import MappedFile
from ..weights import StoredTensor
from .architectures import Description, describe
from .header import Header, read_header
from .tensors import read_gguf_tensors, read_rope_factors
from .tokenizer import GgufVocabulary


@dataclass(frozen=True)
class GgufFile:
    """A file of which all but the weights have been read."""

    header: Header
    description: Description
    vocabulary: GgufVocabulary
    _mapped: MappedFile

    @staticmethod
    def open(path: Path) -> "GgufFile":
        """
        Raises:
            ValueError: the file cannot be read, is corrupt, or describes a model that is not supported.
        """
        try:
            mapped = MappedFile(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        header = read_header(path)
        vocabulary = GgufVocabulary(path, header.metadata)
        shapes = {name: info.shape for name, info in header.tensors.items()}
        end_ids = vocabulary.end_ids()
        try:
            description = describe(header.metadata, shapes, read_rope_factors(header), end_ids)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).replace('config.json', 'its metadata', 1)}") from None
        return GgufFile(header, description, vocabulary, mapped)

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name.

        Raises:
            ValueError: the file has been changed since it was opened.
        """
        return read_gguf_tensors(self.header, self.description, self._mapped)
