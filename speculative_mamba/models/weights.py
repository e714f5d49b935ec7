"""Reads the tensors of a checkpoint folder: safetensors or PyTorch files, one or many, memory-mapped."""

import ctypes
import json
import mmap
import pickle
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name. They lie in the mapped files; a page is read when it is first used.

    Raises:
        ValueError: no weights, a missing shard, a truncated or corrupt file, or one that holds more than tensors.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder, folder / f"{name}.index.json")
    raise ValueError(f"{folder} has no weights: neither {' nor '.join(_WEIGHT_FILES)}, nor an index of shards")


def _read_shards(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    shards = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks the shard {name}, which {index.name} names; download it again")
        shards[name] = _read_file(folder / name)
    missing = sorted(tensor for tensor, name in weight_map.items() if tensor not in shards[name])
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is not in the shard that {index.name} names")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is truncated, corrupt or not a weights file: {reason[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors")
    return tensors


def release_pages(tensor: torch.Tensor) -> None:
    """Gives back the memory of a mapped file's pages once they have been converted; they can be read again."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
