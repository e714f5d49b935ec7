"""How the blocks of GGUF lie in groups of sixteen rows of a matrix.

All formats have scales, then quants. The quants of 32 features of a group are vectors of 64 bytes: vector i has four
features of row 0, of row 1 and so on. In q8_0 these are features 4i … 4i+3, each plus 128. In the others a byte has
feature 4i+j in its lower half and feature 16+4i+j in the upper one. q6_k has its two upper bits in two more vectors: in
byte j of vector h, bits 2i and 2i+1 are of feature 16h+4i+j.
"""

from abc import ABC, abstractmethod

import torch

GROUP = 16  # rows
BLOCK = 32  # features
_LINE = 64  # bytes to a multiple of which scales are padded


class BlockFormat(ABC):
    """What a format's blocks hold. Known to the kernels by its name.

    features: of a block in the file, block_bytes: its size there. scale_bytes: of the scales of so many features of a
    group. quant_bytes: of the quants of 32 features of a group.
    """

    features: int
    block_bytes: int
    scale_bytes: int
    quant_bytes: int

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"gguf.{self.name}"

    __repr__ = __str__

    def row_bytes(self, K: int) -> int:
        """Of a row in the file."""
        return K // self.features * self.block_bytes

    def group_bytes(self, K: int) -> int:
        return self.quants_at(K) + K // BLOCK * self.quant_bytes

    def quants_at(self, K: int) -> int:
        """Where they begin in a group."""
        return -(-(K // self.features * self.scale_bytes) // _LINE) * _LINE

    def pack(self, raw: torch.Tensor, data: torch.Tensor) -> None:
        """raw (16·G, bytes of a row), data (G, bytes of a group); **written**."""
        blocks = raw.view(len(data), GROUP, -1, self.block_bytes)
        K = blocks.shape[2] * self.features
        scales, quants = self._pack(blocks)
        end = self.quants_at(K)
        data[:, : scales.shape[1]] = scales
        data[:, scales.shape[1] : end] = 0
        data[:, end:] = quants

    def values(self, data: torch.Tensor, ids: torch.Tensor, K: int) -> torch.Tensor:
        """(M, K) float32 of rows ids (M)."""
        groups, row = ids // GROUP, ids % GROUP
        scales = data[groups, : K // self.features * self.scale_bytes].view(
            len(ids), K // self.features, self.scale_bytes
        )
        vectors = self.quant_bytes // (4 * GROUP)
        quants = data[:, self.quants_at(K) :].view(len(data), K // BLOCK, vectors, GROUP, 4)[groups, :, :, row]
        return self._values(scales, quants, row).view(len(ids), K)

    def zero_rows(self, data: torch.Tensor, ids: torch.Tensor, K: int) -> None:
        """Their scales become 0."""
        scales = data[:, : K // self.features * self.scale_bytes].unflatten(1, (-1, self.scale_bytes))
        for at in range(0, self._halves * 2 * GROUP, 2 * GROUP):
            halves = scales[..., at : at + 2 * GROUP].unflatten(-1, (GROUP, 2))
            halves[ids // GROUP, :, ids % GROUP] = 0

    _halves = 1  # scales of 16 bits of each row, with which those of a block begin

    @abstractmethod
    def _pack(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """blocks (G, 16, blocks of a row, bytes) → scales (G, bytes) and quants (G, bytes)."""

    @abstractmethod
    def _values(self, scales: torch.Tensor, quants: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """scales (M, blocks, bytes of a group), quants (M, blocks of 32, vectors, 4), row (M) of the group."""


class _Q8(BlockFormat):
    features, block_bytes, scale_bytes, quant_bytes = 32, 34, 32, 512

    def _pack(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _of_rows(blocks[..., :2]), _in_fours(blocks[..., 2:]) ^ 128

    def _values(self, scales: torch.Tensor, quants: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return _half(scales, 0, row)[..., None] * (quants.flatten(2).float() - 128)


class _Q4(BlockFormat):
    features, block_bytes, scale_bytes, quant_bytes = 32, 18, 32, 256

    def _pack(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _of_rows(blocks[..., :2]), _in_fours(blocks[..., 2:])

    def _values(self, scales: torch.Tensor, quants: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return _half(scales, 0, row)[..., None] * (_halves_of_bytes(quants).float() - 8)


class _Q4K(BlockFormat):
    """Scales: 16 halves d, 16 halves dmin, then for each 32 features 16 bytes s and 16 bytes m; a value is
    d·s·q - dmin·m."""

    features, block_bytes, scale_bytes, quant_bytes = 256, 144, 64 + 8 * 32, 256
    _halves = 2

    def _pack(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
        scale = torch.cat([low & 63, rest & 15 | low >> 6 << 4], -1)
        minimum = torch.cat([high & 63, rest >> 4 | high >> 6 << 4], -1)
        small = torch.stack([scale, minimum], -1)  # (G, 16, blocks, 8, 2)
        small = small.permute(0, 2, 3, 4, 1).flatten(3).flatten(2)
        halves = [blocks[..., at : at + 2].transpose(1, 2).flatten(2) for at in (0, 2)]
        quants = blocks[..., 16:].unflatten(-1, (4, 32))
        quants = torch.stack([quants & 15, quants >> 4], -2).flatten(-3, -2)  # (G, 16, blocks, 8, 32)
        return torch.cat([*halves, small], -1).flatten(1), _in_fours(_as_halves_of_bytes(quants).flatten(2, 3))

    def _values(self, scales: torch.Tensor, quants: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        small = _small(scales[..., 64:], row).float()  # (M, blocks, 8, 2)
        d, dmin = (_half(scales, at, row)[..., None] for at in (0, 32))
        scale, minimum = (d * small[..., 0])[..., None], (dmin * small[..., 1])[..., None]
        return scale * _halves_of_bytes(quants).unflatten(1, (-1, 8)).float() - minimum


class _Q6K(BlockFormat):
    """Scales: 16 halves d, then for each 16 features 16 bytes s, signed; a value is d·s·(q - 32)."""

    features, block_bytes, scale_bytes, quant_bytes = 256, 210, 32 + 8 * 32, 384

    def _pack(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = blocks[..., :128].unflatten(-1, (2, 1, 64)), blocks[..., 128:192].unflatten(-1, (2, 32))
        low = torch.cat([low & 15, low >> 4], -2).unflatten(-1, (2, 32)).flatten(-3, -2)  # (G, 16, blocks, 2, 4, 32)
        high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], -2)
        low, high = (part.flatten(2, 4) for part in (low, high))  # (G, 16, blocks of 32, 32)
        first, second, third, fourth = high.unflatten(-1, (2, 4, 4)).unbind(-2)
        pairs = (first | second << 2 | third << 4 | fourth << 6).flatten(-2)
        quants = _in_fours(torch.cat([_as_halves_of_bytes(low), pairs], -1))
        small = blocks[..., 192:208].transpose(1, 2).transpose(2, 3).flatten(2)
        return torch.cat([blocks[..., 208:].transpose(1, 2).flatten(2), small], -1).flatten(1), quants

    def _values(self, scales: torch.Tensor, quants: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        scale = _half(scales, 0, row)[..., None, None] * _small(scales[..., 32:], row).view(torch.int8).float()
        pairs = quants[:, :, 4:]
        high = torch.stack([pairs >> shift & 3 for shift in (0, 2, 4, 6)], -2).flatten(2)
        levels = (_halves_of_bytes(quants[:, :, :4]) | high << 4).float() - 32
        return scale[..., None] * levels.view(*scale.shape, 16)


def _of_rows(parts: torch.Tensor) -> torch.Tensor:
    """(G, 16, B, bytes) → (G, B · 16 · bytes)."""
    return parts.transpose(1, 2).flatten(1)


def _in_fours(quants: torch.Tensor) -> torch.Tensor:
    """(G, 16, B, bytes) → (G, B · bytes · 16): four bytes of each row in turn."""
    return quants.unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4).flatten(1)


def _as_halves_of_bytes(levels: torch.Tensor) -> torch.Tensor:
    """(…, 32) below 16 → (…, 16)."""
    return levels[..., :16] | levels[..., 16:] << 4


def _halves_of_bytes(quants: torch.Tensor) -> torch.Tensor:
    """(M, B, 4, 4) → (M, B, 32) below 16."""
    quants = quants.flatten(2)
    return torch.cat([quants & 15, quants >> 4], -1)


def _half(scales: torch.Tensor, at: int, row: torch.Tensor) -> torch.Tensor:
    """(M, blocks) float32: of each row a half among sixteen from byte ``at`` on."""
    halves = scales[..., at : at + 2 * GROUP].contiguous().view(torch.float16)
    return halves[torch.arange(len(row), device=row.device), :, row].float()


def _small(scales: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """(M, blocks, 8, 2) bytes."""
    scales = scales.unflatten(-1, (8, 2, GROUP))
    return scales[torch.arange(len(row), device=row.device), ..., row]


FORMATS = {"q8_0": _Q8("q8_0"), "q4_0": _Q4("q4_0"), "q4_k": _Q4K("q4_k"), "q6_k": _Q6K("q6_k")}
