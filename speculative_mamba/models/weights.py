"""Reads the tensors of a checkpoint folder: safetensors or PyTorch files, one or many, memory-mapped."""

import ctypes
import mmap
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch.torch_version import TorchVersion

from ..ops.block_formats import FORMATS
from ..ops.values import reason, shown
from .files import UNREADABLE, MappedFile, check_readable, is_there, read_json

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SAFE_UNPICKLING = (2, 10)  # before it torch.load could be made to run code: CVE-2025-32434, CVE-2026-24747


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the memory of a mapped file, or None: of somebody else. order: of its rows, where they are used in
    another than they lie in. format: of the blocks whose bytes its rows are, None where they are numbers."""

    tensor: torch.Tensor
    file: MappedFile | None
    order: torch.Tensor | None = None
    format: str | None = None

    @property
    def shape(self) -> torch.Size:
        if self.format is None:
            return self.tensor.shape
        features = FORMATS[self.format].features
        blocks = self.tensor.shape[-1] // FORMATS[self.format].row_bytes(features)
        return torch.Size((*self.tensor.shape[:-1], blocks * features))


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name. They lie in the mapped files; a page is read when it is first used.

    Raises:
        ValueError: no weights, a missing shard, a truncated or corrupt file, or one that holds more than tensors.
    """
    for name in WEIGHT_FILES:
        if is_there(folder / name):
            return _read_file(folder / name)
        if is_there(folder / f"{name}.index.json"):
            return _read_shards(folder, folder / f"{name}.index.json")
    raise ValueError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}, nor an index of shards")


def check_unpickling(path: object) -> None:
    """
    Raises:
        ValueError: this PyTorch does not read pickled weights safely.
    """
    if TorchVersion(torch.__version__) < SAFE_UNPICKLING:
        raise ValueError(
            f"{path} holds pickled weights, and torch {torch.__version__} can be made to run code by such a file "
            "(CVE-2026-24747); take the checkpoint as safetensors, or torch 2.10 or newer"
        )


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    tensors: dict[str, StoredTensor] = {}
    held: dict[str, set[str]] = {}
    for name in sorted({_shard_name(index, name) for name in weight_map.values()}):
        if not is_there(folder / name):
            raise ValueError(f"{folder} lacks the shard {shown(name)}, which {index.name} names; download it again")
        if Path(name).suffix != suffix:
            raise ValueError(f"{index} names the shard {shown(name)}, which is no {suffix} file")
        shard = _read_file(folder / name)
        held[name] = set(shard)
        # What a shard holds beyond the index counts as well: nothing of it may be left out in silence.
        tensors |= {tensor: stored for tensor, stored in shard.items() if weight_map.get(tensor, name) == name}
    missing = sorted(tensor for tensor, name in weight_map.items() if tensor not in held[name])
    if missing:
        raise ValueError(f"{folder}: {shown(missing[0])} is not in the shard that {index.name} names")
    return tensors


def _shard_name(index: Path, name: object) -> str:
    """A name below the folder of the index."""
    inside = isinstance(name, str) and name and "\0" not in name
    for path in (PurePosixPath(name), PureWindowsPath(name)) if inside else ():
        inside = inside and not path.anchor and ".." not in path.parts
    if not inside:
        raise ValueError(f"{index} names the shard {shown(name)}, which is no file in its folder")
    return name


def _read_file(path: Path) -> dict[str, StoredTensor]:
    check_readable(path)
    if path.suffix != ".safetensors":
        check_unpickling(path)
    try:
        file = MappedFile(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds other objects than tensors, or is corrupt; of a whole model save the state_dict, best with "
            "safetensors.torch.save_file"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} {UNREADABLE}: {reason(error)}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} must hold a dictionary of tensors")
    file.check(path)
    return {name: StoredTensor(tensor.detach(), file) for name, tensor in tensors.items()}


def release_pages(tensor: torch.Tensor) -> None:
    """Gives back the memory of a mapped file's pages once they have been converted; they can be read again."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
