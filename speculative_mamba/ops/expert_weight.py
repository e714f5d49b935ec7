"""The matrices of a layer's experts, wherever they lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .block_weight import BlockWeight


@dataclass(frozen=True)
class ExpertWeight:
    """E matrices (N, K) of one dtype, whose rows are equally far apart; or all in the blocks of one format.

    Some checkpoints store one tensor (E, N, K), others a matrix per expert; both are used where they are.

    matrices: of each expert; in blocks the data of a ``BlockWeight``, and format and matrix_shape, (N, K), are its too.

    Raises:
        ValueError: there are none, or they differ in shape, dtype, device or strides, or are not dense float matrices.
    """

    matrices: tuple[torch.Tensor, ...]
    format: str | None = None
    matrix_shape: torch.Size | None = None
    _offsets: torch.Tensor = field(init=False, compare=False, repr=False)
    _places: list[int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.matrices:
            raise ValueError("an ExpertWeight needs at least one matrix")
        kinds = {(type(m), m.shape, m.dtype, m.device) for m in self.matrices}
        if len(kinds) > 1 or not isinstance(self.matrices[0], torch.Tensor) or self.matrices[0].ndim != 2:
            raise ValueError("experts must be float matrices of one shape, dtype and device")
        if len({m.stride(0) for m in self.matrices}) > 1:
            raise ValueError("rows of all experts must be equally far apart; copy them into one tensor")
        places, size = self._data_ptrs(), self.matrices[0].element_size()
        if any((place - places[0]) % size for place in places):
            raise ValueError(f"experts must lie at a multiple of their {size} bytes per element; copy them")
        offsets = torch.tensor([(place - places[0]) // size for place in places], dtype=torch.int64, device="cpu")
        object.__setattr__(self, "_offsets", offsets.to(self.matrices[0].device))
        object.__setattr__(self, "_places", places)

    def __reduce__(self) -> tuple:
        # A part of a tensor would be pickled with all of it.
        return _of_one_tensor, (torch.stack(self.matrices), self.format, self.matrix_shape)

    def _data_ptrs(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.matrices))

    def __getitem__(self, expert: int) -> torch.Tensor | BlockWeight:
        """An expert's matrix."""
        matrix = self.matrices[expert]
        return matrix if self.format is None else BlockWeight(matrix, self.format, self.matrix_shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.matrices), *(self.matrices[0].shape if self.format is None else self.matrix_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; uint8 where they are in blocks."""
        return self.matrices[0].dtype

    @property
    def device(self) -> torch.device:
        return self.matrices[0].device

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def offsets(self) -> torch.Tensor:
        """(E) int64: how many elements behind the first matrix each begins, also after one was given other memory."""
        if self._places != self._data_ptrs():
            self.__post_init__()
        return self._offsets

    @staticmethod
    def of_blocks(matrices: Sequence[BlockWeight]) -> "ExpertWeight":
        """
        Raises:
            ValueError: they differ in format, shape or device.
        """
        first = matrices[0]
        if {(weight.format, weight.shape) for weight in matrices} != {(first.format, first.shape)}:
            raise ValueError("experts must be in blocks of one format and shape")
        return ExpertWeight(tuple(weight.data for weight in matrices), first.format, first.shape)


def _of_one_tensor(matrices: torch.Tensor, format: str | None, matrix_shape: torch.Size | None) -> ExpertWeight:
    return ExpertWeight(tuple(matrices), format, matrix_shape)
