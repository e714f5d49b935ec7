"""A weight matrix in the blocks of GGUF, repacked for kernels that take sixteen rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import huge_pages
from .block_formats import BLOCK, FORMATS, GROUP, BlockFormat

_CHUNK = 1 << 18  # weights converted at a time
_HALF_ZERO = 2.0**-25  # the largest number that is 0 as a half


@dataclass(frozen=True)
class BlockWeight:
    """An (N, K) matrix in GGUF's blocks, its rows repacked in groups of 16; rows that fill up the last group are 0.

    data: (⌈N/16⌉, bytes of a group) uint8, contiguous. A group has the scales of all its blocks, padded to a multiple
    of 64 bytes, then their quants. format: ``"q8_0"``, ``"q4_0"``, ``"q4_k"`` or ``"q6_k"``; ``FORMATS`` says how each
    lies. shape: (N, K).
    """

    data: torch.Tensor
    format: str
    shape: torch.Size

    @property
    def dtype(self) -> BlockFormat:
        return FORMATS[self.format]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    def stride(self) -> tuple[int, ...]:
        """In bytes: from group to group."""
        return self.data.stride()

    def to(self, device: torch.device) -> "BlockWeight":
        return BlockWeight(self.data.to(device), self.format, self.shape)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (M) int64 → (M, K) float32, as an embedding looks them up."""
        return self.dtype.values(self.data, ids, self.shape[1])

    def dequantized(self) -> torch.Tensor:
        """(N, K) float32: the values that GGML computes with."""
        values = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for rows in _chunks(self.shape):
            values[rows] = self.rows(torch.arange(rows.start, rows.stop, device=self.device))
        return values

    def zero_rows(self, ids: torch.Tensor) -> None:
        """Makes rows 0, whatever they hold, also NaN."""
        self.dtype.zero_rows(self.data, ids, self.shape[1])

    @classmethod
    def from_gguf(cls, raw: torch.Tensor, format: str, K: int) -> "BlockWeight":
        """The same values, exactly.

        raw: (N, bytes of a row) uint8, as the file has it. K: features of a row.

        Raises:
            ValueError: the format is unknown, K is no multiple of its blocks, or rows have another number of bytes.
        """
        kind = find_format(format, K)
        if raw.ndim != 2 or raw.dtype is not torch.uint8 or raw.shape[1] != kind.row_bytes(K):
            raise ValueError(
                f"{len(raw)} rows of {K} features in {format} must be uint8 of shape "
                f"({len(raw)}, {kind.row_bytes(K)}), got {raw.dtype} of {tuple(raw.shape)}"
            )
        shape = torch.Size((len(raw), K))
        weight = cls(_empty(kind, shape, raw.device), format, shape)
        for rows in _chunks(shape):
            weight._set(rows, raw[rows])
        return weight

    def _set(self, rows: slice, raw: torch.Tensor) -> None:
        """Repacks rows, of which the first begins a group."""
        raw = torch.nn.functional.pad(raw, (0, 0, 0, -len(raw) % GROUP))
        groups = slice(rows.start // GROUP, rows.start // GROUP + len(raw) // GROUP)
        self.dtype.pack(raw, self.data[groups])


def numbers_of_gguf(raw: torch.Tensor, format: str, K: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, K) of a float dtype: the values of blocks as ``from_gguf`` takes them. Some rows are converted at a time.

    Raises:
        ValueError: as of ``from_gguf``.
    """
    values = huge_pages.empty(len(raw), K, dtype=dtype, device=raw.device)
    for rows in _chunks(values.shape):
        values[rows] = BlockWeight.from_gguf(raw[rows], format, K).dequantized()
    return values


def find_format(format: str, K: int) -> BlockFormat:
    """
    Raises:
        ValueError: the format is unknown, or K is no multiple of its blocks.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format of blocks {format!r}; choose from: {', '.join(FORMATS)}")
    size = FORMATS[format].features
    if K % size or not K:
        raise ValueError(f"{format} has blocks of {size} features, so {K} of them cannot be in it")
    return FORMATS[format]


def can_quantize(K: int) -> bool:
    """Whether rows of K features are made of full blocks, as ``quantized`` asks."""
    return K > 0 and K % BLOCK == 0


def quantized(weight: torch.Tensor, format: str) -> BlockWeight:
    """The blocks that GGML makes of a matrix: weight (N, K) of any float dtype; format ``"q8_0"`` or ``"q4_0"``.

    Some rows are converted at a time: no copy in float is made.

    Raises:
        ValueError: a weight is NaN, infinite or too large for the format, the format is another one, or K is no
            multiple of 32.
    """
    if format not in _QUANTIZE:
        raise ValueError(f"weights are quantized to {' or '.join(_QUANTIZE)}, not to {format!r}")
    kind, quantize = find_format(format, weight.shape[1]), _QUANTIZE[format]
    result = BlockWeight(_empty(kind, weight.shape, torch.device("cpu")), format, weight.shape)
    for rows in _chunks(weight.shape):
        scale, quants = quantize(weight[rows].to("cpu", torch.float32).reshape(-1, BLOCK))
        scale = scale.half()
        if not scale.isfinite().all():
            raise ValueError(f"a weight that is NaN, infinite or too large for a half cannot be {format}")
        raw = torch.cat([scale.view(torch.uint8), quants.view(torch.uint8)], 1)
        result._set(rows, raw.view(rows.stop - rows.start, -1))
    return result.to(weight.device)


def _quantize_q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (B, 1) and 32 integers (B, 32) of each block (B, 32); halves are rounded away from zero."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    whole = scaled.trunc()
    return scale, scaled.sub_(whole).mul_(2).trunc_().add_(whole).to(torch.int8)


def _quantize_q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest weight, of equal ones the first, becomes -8. Features i and 16+i share a byte (B, 16)."""
    high, low = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    tied = (high == -low)[:, 0].nonzero()[:, 0]  # few, and an argmax takes long
    largest[tied] = blocks[tied].gather(1, blocks[tied].abs().argmax(1, keepdim=True))
    scale = largest / -8
    levels = (blocks.double() * _inverse(scale)).add_(8.5).clamp_(0, 15).to(torch.uint8)
    return scale, levels[:, :16] | levels[:, 16:] << 4


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """0 where there is none, or where the scale is 0 as a half, so that its integers do not count."""
    return torch.where(scale.abs() <= _HALF_ZERO, 0, 1 / scale)


_QUANTIZE = {"q8_0": _quantize_q8_0, "q4_0": _quantize_q4_0}


def _empty(kind: BlockFormat, shape: torch.Size, device: torch.device) -> torch.Tensor:
    return huge_pages.empty(-(-shape[0] // GROUP), kind.group_bytes(shape[1]), dtype=torch.uint8, device=device)


def _chunks(shape: torch.Size) -> Iterator[slice]:
    step = max(1, _CHUNK // (GROUP * shape[1])) * GROUP
    for first in range(0, shape[0], step):
        yield slice(first, min(shape[0], first + step))
