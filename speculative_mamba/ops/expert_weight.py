"""The matrices of a layer's experts, wherever they lie."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ExpertWeight:
    """E matrices (N, K) of one dtype, whose rows are equally far apart.

    Some checkpoints store one tensor (E, N, K), others a matrix per expert; both are used where they are.

    Raises:
        ValueError: there are none, or they differ in shape, dtype, device or strides, or are not dense float matrices.
    """

    matrices: tuple[torch.Tensor, ...]
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
        return _of_one_tensor, (torch.stack(self.matrices),)  # a part of a tensor would be pickled with all of it

    def _data_ptrs(self) -> list[int]:
        return [matrix.data_ptr() for matrix in self.matrices]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.matrices), *self.matrices[0].shape

    @property
    def dtype(self) -> torch.dtype:
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


def _of_one_tensor(matrices: torch.Tensor) -> ExpertWeight:
    return ExpertWeight(tuple(matrices))
