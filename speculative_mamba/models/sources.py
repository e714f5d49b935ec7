"""Where the builder gets tensors from: the headers first, to check them all, then the mapped weights."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..ops import huge_pages
from ..ops.block_weight import BlockWeight, can_quantize, numbers_of_gguf, quantized
from ..ops.expert_weight import ExpertWeight
from ..ops.values import shown
from .files import MappedFile
from .weights import StoredTensor, release_pages

QUANTIZED = ("q8_0", "q4_0")  # formats of GGUF's blocks
FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = (*FLOAT_DTYPES.values(), torch.float64)
_COMPUTED = (".rotary_emb.inv_freq",)  # buffers that older versions of transformers stored; the config says the same
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_Weight = TypeVar("_Weight", torch.Tensor, BlockWeight, ExpertWeight)


def check_format(folder: Path, stored: dict[str, StoredTensor], dtype: torch.dtype | str | None) -> None:
    """
    Raises:
        ValueError: blocks of one format would be made from those of another, whose rounding errors they would add to.
    """
    for name, tensor in stored.items():
        if dtype in QUANTIZED and tensor.format not in (None, dtype):
            raise ValueError(
                f"{folder}: {name} is stored as {tensor.format}, so it cannot become {dtype}; leave dtype out, or make "
                "the file anew from one in F16, BF16 or F32"
            )


class HeaderSource:
    """Checks names, shapes and dtypes of all that a config calls for. No weights are read: it gives zeros, of which a
    tensor takes the memory of one.

    Raises:
        ValueError: a tensor is missing, or has another shape, or holds numbers of another kind.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, stored: dict[str, StoredTensor], described_by: str = "config.json") -> None:
        self._folder, self._stored, self._described_by = folder, stored, described_by
        self._asked: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._stored

    def equal(self, first: str, second: str) -> bool:
        return False  # so that the builder asks for both

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor:
        tensor = self._zeros(name, shape, may_be_blocks=True)
        return tensor if rows is None else tensor[rows]

    def experts(self, names: str | Sequence[str], *shape: int, rows: slice | None = None) -> ExpertWeight:
        if isinstance(names, str):
            matrices = self._zeros(names, shape, may_be_blocks=True)
        else:
            matrices = [self._zeros(name, shape[1:], may_be_blocks=True) for name in names]
        return ExpertWeight(tuple(matrix if rows is None else matrix[rows] for matrix in matrices))

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        return self._zeros(name, shape, may_be_blocks=False)

    float32 = weight

    def _zeros(self, name: str, shape: tuple[int, ...], may_be_blocks: bool) -> torch.Tensor:
        if name not in self._stored:
            raise ValueError(f"{self._folder}: the weights lack {name}, which {self._described_by} calls for")
        stored = self._stored[name]
        if stored.shape != shape:
            has, given = tuple(stored.shape), f"{self._described_by} gives {shape}"
            raise ValueError(f"{self._folder}: {name} has shape {has}, but {given}")
        dtype = stored.tensor.dtype
        if stored.format is not None:
            if not may_be_blocks:
                raise ValueError(f"{self._folder}: {name} is stored as {stored.format}; only matrices may be")
            dtype = torch.float32
        elif dtype not in _STORED_DTYPES or stored.tensor.layout is not torch.strided:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{self._folder}: {name} is stored as {kind}; weights must be float32, bfloat16, float16 or float64 "
                "(quantised checkpoints are not supported)"
            )
        self._asked.add(name)
        return torch.zeros((), dtype=dtype, device=self.device).expand(shape)

    def refuse_others(self) -> None:
        """After the builder has asked for everything.

        Raises:
            ValueError: there is a tensor that it did not ask for, and which might change the result.
        """
        others = sorted(name for name in self._stored if name not in self._asked and not name.endswith(_COMPUTED))
        if others:
            more = f" and {len(others) - 1} more" if others[1:] else ""
            raise ValueError(
                f"{self._folder}: the weights hold {shown(others[0])}{more}, which {self._described_by} does not call "
                "for; a model without them would be another one"
            )


class CountingSource:
    """Another source, and how many elements it was asked for. tell: is called with that number after each tensor."""

    def __init__(self, source: "HeaderSource | StoredSource", tell: Callable[[int], None] = lambda count: None) -> None:
        self._source, self._tell = source, tell
        self.device, self.has, self.equal = source.device, source.has, source.equal
        self.elements = 0

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor | BlockWeight:
        return self._counted(self._source.matrix(name, *shape, rows=rows), shape)

    def experts(self, names: str | Sequence[str], *shape: int, rows: slice | None = None) -> ExpertWeight:
        return self._counted(self._source.experts(names, *shape, rows=rows), shape)

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        return self._counted(self._source.weight(name, *shape), shape)

    def float32(self, name: str, *shape: int) -> torch.Tensor:
        return self._counted(self._source.float32(name, *shape), shape)

    def _counted(self, weight: _Weight, shape: tuple[int, ...]) -> _Weight:
        self.elements += math.prod(shape)
        self._tell(self.elements)
        return weight


class StoredSource:
    """Tensors of a checkpoint that ``HeaderSource`` has checked; those are converted that need it.

    dtype: of the weights, None as stored; or a format of blocks for matrices, but not for those without full blocks.
    mapped: the files in which some of them still lie. With ``mmap`` false all are copied.
    """

    def __init__(
        self,
        folder: Path,
        stored: dict[str, StoredTensor],
        dtype: torch.dtype | str | None,
        device: torch.device,
        mmap: bool,
    ) -> None:
        self._folder, self._stored, self._dtype, self._mmap = folder, stored, dtype, mmap
        self.device = device
        self.mapped: dict[Path, MappedFile] = {}
        self._said = self._said_experts = False  # that a matrix, that experts are not in blocks

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
        if same:
            self._release(first, a)
        return same

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor | BlockWeight:
        return self._matrix(name, self._in_order(name, rows))

    def experts(self, names: str | Sequence[str], *shape: int, rows: slice | None = None) -> ExpertWeight:
        if isinstance(names, str):
            parts = [(names, part) for part in self._stored[names].tensor]
        else:
            parts = [(name, self._in_order(name)) for name in names]
        parts = [(name, part if rows is None else part[rows]) for name, part in parts]
        if self.device.type == "cuda":
            return ExpertWeight(tuple(self._no_blocks(name, part) for name, part in parts))
        matrices = [self._matrix(name, part) for name, part in parts]
        blocks = isinstance(matrices[0], BlockWeight)
        return ExpertWeight.of_blocks(matrices) if blocks else ExpertWeight(tuple(matrices))

    def _no_blocks(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """An expert's matrix on a GPU, which has no kernels for those in blocks."""
        format = self._stored[name].format
        if isinstance(self._dtype, torch.dtype):
            return self._matrix(name, stored)
        if format is not None:
            raise ValueError(
                f"{self._folder}: {name} is stored as {format}, which experts on a GPU cannot be; give a dtype"
            )
        if self._dtype is not None and not self._said_experts:
            print(f"speculative_mamba: {self._folder}: experts stay as stored, not {self._dtype}", file=sys.stderr)
            self._said_experts = True
        return self._converted(name, stored, self._dtype_of(stored))

    def _matrix(self, name: str, stored: torch.Tensor) -> torch.Tensor | BlockWeight:
        """stored: rows of the named tensor."""
        if self._stored[name].format is not None:
            return self._from_blocks(name, stored)
        if self._dtype not in QUANTIZED:
            return self._converted(name, stored, self._dtype_of(stored))
        if not can_quantize(stored.shape[1]):
            self._say_once(name, stored)
            return self._converted(name, stored, self._dtype_of(stored))
        try:
            weight = quantized(stored, self._dtype)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {name}: {error}") from None
        self._release(name, stored)
        return weight.to(self.device)

    def _from_blocks(self, name: str, raw: torch.Tensor) -> torch.Tensor | BlockWeight:
        """A matrix that is stored in blocks, and stays so unless the dtype is one of numbers."""
        stored = self._stored[name]
        features = stored.shape[-1]
        if isinstance(self._dtype, torch.dtype):
            weight = numbers_of_gguf(raw, stored.format, features, self._dtype)
        else:
            weight = BlockWeight.from_gguf(raw, stored.format, features)
        self._release(name, raw)
        return weight.to(self.device)

    def _say_once(self, name: str, stored: torch.Tensor) -> None:
        if not self._said:
            kind = str(self._dtype_of(stored)).removeprefix("torch.")
            print(
                f"speculative_mamba: {self._folder}: {name} stays {kind}, and so does every matrix whose width, here "
                f"{stored.shape[1]}, is no multiple of 32, as {self._dtype} has it",
                file=sys.stderr,
            )
        self._said = True

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        stored = self._in_order(name)
        return self._converted(name, stored, self._dtype_of(stored))

    def float32(self, name: str, *shape: int) -> torch.Tensor:
        return self._converted(name, self._in_order(name), torch.float32)

    def _in_order(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """In the order in which its rows are used; without an order in the memory of the file."""
        stored = self._stored[name]
        tensor = stored.tensor
        if stored.order is not None:
            tensor = tensor[stored.order]
            self._release(name, stored.tensor)
        return tensor if rows is None else tensor[rows]

    def _is_shared(self, name: str, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._stored[name].tensor.untyped_storage().data_ptr()

    def _release(self, name: str, tensor: torch.Tensor) -> None:
        """Gives back the pages of a file after a tensor that lies in them was copied."""
        in_file = self._stored[name].file is not None and self._is_shared(name, tensor)
        if in_file and tensor.is_contiguous():
            release_pages(tensor)

    def _dtype_of(self, stored: torch.Tensor) -> torch.dtype:
        as_stored = stored.dtype if stored.dtype in FLOAT_DTYPES.values() else torch.float32
        return self._dtype if isinstance(self._dtype, torch.dtype) else as_stored

    def _converted(self, name: str, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if stored.dtype == dtype or self.device.type != "cpu":
            tensor = stored.to(self.device, dtype).contiguous()
        else:
            tensor = huge_pages.copy(stored, dtype)
        if self._is_shared(name, tensor):
            if self._mmap:
                file = self._stored[name].file
                if file is None:
                    return tensor
                self.mapped[file.path] = file
                return _trimmed(tensor)
            tensor = huge_pages.copy(tensor, dtype)
        self._release(name, stored)
        return tensor


def _trimmed(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without what else its storage holds, so that a copy of the tensor copies no more than it."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == tensor.nbytes:
        return tensor
    begin = tensor.storage_offset() * tensor.element_size()
    own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return own.set_(storage[begin : begin + tensor.nbytes], 0, tensor.shape, tensor.stride())
