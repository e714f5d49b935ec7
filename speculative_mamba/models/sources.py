"""Where the builder gets tensors from: the headers first, to check them all, then the mapped weights."""

from pathlib import Path

import torch

from ..ops.int8 import Int8Weight, quantised
from ..ops.values import shown
from .files import MappedFile
from .weights import StoredTensor, release_pages

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = (*FLOAT_DTYPES.values(), torch.float64)
_COMPUTED = (".rotary_emb.inv_freq",)  # buffers that older versions of transformers stored; the config says the same
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class HeaderSource:
    """Checks names, shapes and dtypes of all that a config calls for. No weights are read: it gives zeros, of which a
    tensor takes the memory of one.

    Raises:
        ValueError: a tensor is missing, or has another shape, or holds numbers of another kind.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, stored: dict[str, StoredTensor]) -> None:
        self._folder, self._stored = folder, stored
        self._asked: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._stored

    def equal(self, first: str, second: str) -> bool:
        return False  # so that the builder asks for both

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor:
        tensor = self.weight(name, *shape)
        return tensor if rows is None else tensor[rows]

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self._stored:
            raise ValueError(f"{self._folder}: the weights lack {name}, which config.json calls for")
        tensor = self._stored[name].tensor
        if tensor.shape != shape:
            raise ValueError(f"{self._folder}: {name} has shape {tuple(tensor.shape)}, but config.json gives {shape}")
        if tensor.dtype not in _STORED_DTYPES or tensor.layout is not torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self._folder}: {name} is stored as {kind}; weights must be float32, bfloat16, float16 or float64 "
                "(quantised checkpoints are not supported)"
            )
        self._asked.add(name)
        return torch.zeros((), dtype=tensor.dtype, device=self.device).expand(shape)

    float32 = weight

    def refuse_others(self) -> None:
        """After the builder has asked for everything.

        Raises:
            ValueError: there is a tensor that it did not ask for, and which might change the result.
        """
        others = sorted(name for name in self._stored if name not in self._asked and not name.endswith(_COMPUTED))
        if others:
            more = f" and {len(others) - 1} more" if others[1:] else ""
            raise ValueError(
                f"{self._folder}: the weights hold {shown(others[0])}{more}, which config.json does not call for; a "
                "model without them would be another one"
            )


class StoredSource:
    """Tensors of a checkpoint that ``HeaderSource`` has checked; those are converted that need it.

    mapped: the files in which some of them still lie. With ``mmap`` false all are copied.
    """

    def __init__(
        self,
        folder: Path,
        stored: dict[str, StoredTensor],
        dtype: torch.dtype | None,
        device: torch.device,
        mmap: bool,
    ) -> None:
        self._folder, self._stored, self._dtype, self._mmap = folder, stored, dtype, mmap
        self.device = device
        self.mapped: dict[Path, MappedFile] = {}

    def has(self, name: str) -> bool:
        return name in self._stored

    def equal(self, first: str, second: str) -> bool:
        a, b = self._stored[first].tensor, self._stored[second].tensor
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return True
        bits = _BITS[a.element_size()]
        same = torch.equal(a.view(bits), b.view(bits))
        if same and a.is_contiguous():
            release_pages(a)
        return same

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor | Int8Weight:
        stored = self._stored[name].tensor
        stored = stored if rows is None else stored[rows]
        if self._dtype is not torch.int8:
            return self._converted(name, stored, self._dtype_of(stored))
        try:
            weight = quantised(stored)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {name}: {error}") from None
        if stored.is_contiguous():
            release_pages(stored)
        return Int8Weight(weight.values.to(self.device), weight.scale.to(self.device))

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        stored = self._stored[name].tensor
        return self._converted(name, stored, self._dtype_of(stored))

    def float32(self, name: str, *shape: int) -> torch.Tensor:
        return self._converted(name, self._stored[name].tensor, torch.float32)

    def _dtype_of(self, stored: torch.Tensor) -> torch.dtype:
        as_stored = stored.dtype if stored.dtype in FLOAT_DTYPES.values() else torch.float32
        return as_stored if self._dtype in (None, torch.int8) else self._dtype

    def _converted(self, name: str, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tensor = stored.to(self.device, dtype).contiguous()
        if tensor.data_ptr() != stored.data_ptr():
            copied = tensor
        elif not self._mmap:
            copied = tensor.clone()
        else:
            file = self._stored[name].file
            self.mapped[file.path] = file
            return _trimmed(tensor)
        if stored.is_contiguous():
            release_pages(stored)
        return copied


def _trimmed(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without what else its storage holds, so that a copy of the tensor copies no more than it."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == tensor.nbytes:
        return tensor
    begin = tensor.storage_offset() * tensor.element_size()
    own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return own.set_(storage[begin : begin + tensor.nbytes], 0, tensor.shape, tensor.stride())
