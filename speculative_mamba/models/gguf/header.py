"""The header of a GGUF file (ggml's docs/gguf.md): metadata, and where each tensor lies.

Every size is compared with what is left of the file before anything of that size is read.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Weights of a block, and its bytes.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144),
    "Q6_K": (256, 210), "Q5_0": (32, 22),
}  # fmt: skip
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_VALUES = ("B", "b", "H", "h", "I", "i", "f", "?", "string", "array", "Q", "q", "d")  # by number; codes of struct
_LONGEST_HEADER = 2**28  # bytes; vocabularies of 256 thousand tokens need 2**24
_LONGEST_NAME = 2**8
_MOST_DIMENSIONS = 4

Value = int | float | bool | str | list


@dataclass(frozen=True)
class TensorInfo:
    """shape: outermost dimension first. offset: of the first byte, from the beginning of the file."""

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """
    Raises:
        ValueError: the file cannot be read, is cut short or corrupt, is one of several, or holds weights of a type that
            is not supported.
    """
    try:
        with path.open("rb") as file:
            reader = _Reader(file)
            metadata, infos = _read(reader)
            return Header(path, metadata, _placed(infos, metadata, reader))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the header holds text that is not UTF-8; the file is corrupt") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _Reader:
    """The file from where it was last read to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self._left = min(self.size, _LONGEST_HEADER)

    @property
    def position(self) -> int:
        return self._file.tell()

    def take(self, count: int) -> bytes:
        self.expect(count)
        self._left -= count
        read = self._file.read(count)
        if len(read) != count:
            raise ValueError("the file was cut short while it was read")
        return read

    def expect(self, count: int) -> None:
        """So many bytes more."""
        if count > self._left:
            if self.size > _LONGEST_HEADER:
                raise ValueError(f"the header is longer than {_LONGEST_HEADER} bytes; the file is corrupt")
            raise ValueError(f"the header goes beyond the end of the file ({self.size} bytes); download it again")

    def number(self, code: str) -> int | float | bool:
        [value] = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def name(self) -> str:
        """A text that a message can hold."""
        name = self.text()
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise ValueError("the header has a name that is none; the file is corrupt")
        return name

    def value(self, key: str) -> Value:
        code = self._code(key)
        if code == "string":
            return self.text()
        if code != "array":
            return self.number(code)
        code, count = self._code(key), self.number("Q")
        if code == "array":
            raise ValueError(f"metadata {key} is an array of arrays, which is not supported")
        if code == "string":
            self.expect(8 * count)
            return [self.text() for _ in range(count)]
        self.expect(struct.calcsize(code) * count)
        return np.frombuffer(self.take(struct.calcsize(code) * count), np.dtype(code).newbyteorder("<")).tolist()

    def _code(self, key: str) -> str:
        number = self.number("I")
        if number >= len(_VALUES):
            raise ValueError(f"metadata {key} is of the unknown type {number}; the file is corrupt or newer")
        return _VALUES[number]


def _read(reader: _Reader) -> tuple[dict[str, Value], dict[str, tuple]]:
    """Metadata, and of each tensor its shape, its type and its offset in the data."""
    if reader.size < len(MAGIC) or reader.take(len(MAGIC)) != MAGIC:
        raise ValueError("no GGUF file: it does not begin with GGUF")
    version = reader.number("I")
    if version & 0xFFFF == 0:
        raise ValueError("a big-endian GGUF file, which is not supported; convert the model again")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} is not supported (2 and 3 are); convert the model again")
    tensors, entries = reader.number("Q"), reader.number("Q")
    reader.expect(13 * entries + 24 * tensors)
    metadata: dict[str, Value] = {}
    for _ in range(entries):
        key = reader.name()
        if key in metadata:
            raise ValueError(f"metadata {key} is there twice; the file is corrupt")
        metadata[key] = reader.value(key)
    if metadata.get("split.count", 1) != 1:
        raise ValueError("one of several parts of a model; join them first: llama-gguf-split --merge FIRST_PART WHOLE")
    infos: dict[str, tuple] = {}
    for _ in range(tensors):
        name = reader.name()
        if name in infos:
            raise ValueError(f"tensor {name} is there twice; the file is corrupt")
        dimensions = reader.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions; the file is corrupt")
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        infos[name] = shape, reader.number("I"), reader.number("Q")
    return metadata, infos


def _placed(infos: dict[str, tuple], metadata: dict[str, Value], reader: _Reader) -> dict[str, TensorInfo]:
    """Where tensors lie: behind the header, each at a multiple of the alignment."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.40}; a power of two from 8 on is needed")
    begin = -(-reader.position // alignment) * alignment
    tensors = {}
    for name, (shape, number, offset) in infos.items():
        kind = _TYPES.get(number, f"number {number}")
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name} is of type {kind}, which is not supported; supported: {', '.join(BLOCKS)}")
        weights, nbytes = BLOCKS[kind]
        if shape[-1] % weights:
            raise ValueError(f"tensor {name} has rows of {shape[-1]} weights, no multiple of {weights} as {kind} needs")
        size = math.prod(shape) // weights * nbytes
        if not size or offset % alignment:
            raise ValueError(f"tensor {name} of shape {shape} lies at byte {offset}; the file is corrupt")
        if begin + offset + size > reader.size:
            raise ValueError(
                f"tensor {name} ends at byte {begin + offset + size}, but the file has {reader.size}; download it again"
            )
        tensors[name] = TensorInfo(shape, kind, begin + offset, size)
    return tensors
