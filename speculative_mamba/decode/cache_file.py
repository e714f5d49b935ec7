"""A ``GenerationCache`` as a file: safetensors, with a description in JSON in its header. Nothing in it is run."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.runner import RowState
from ..ops.values import shown

if TYPE_CHECKING:
    from .cache import GenerationCache

_KEY = "speculative_mamba.GenerationCache"
_VERSION = 1


def write(cache: "GenerationCache", path: str | Path) -> None:
    """Another file of that name is replaced when all is written.

    Raises:
        ValueError: it cannot be written.
    """
    states: dict[int, RowState] = {}  # by id; the same one may be in several places

    def number(state: RowState | None) -> int | None:
        if state is None:
            return None
        states.setdefault(id(state), state)
        return list(states).index(id(state))

    parts = cache.parts()
    description = {
        "version": _VERSION,
        "target": parts.target,
        "draft": parts.draft,
        "keep": cache.keep,
        "target_states": [number(state) for state in cache.target_states],
        "draft_states": [number(state) for state in cache.draft_states],
        "kept": [[[number(state) for state in pair] for pair in row] for row in parts.kept],
        "layers": [],
    }
    tensors = {f"sequences.{row}": torch.tensor(text) for row, text in enumerate(cache.sequences)}
    for at, state in enumerate(states.values()):
        tensors[f"{at}.tokens"] = torch.tensor(state.tokens, dtype=torch.int64)
        for layer, saved in enumerate(state.layers):
            tensors |= {f"{at}.{layer}.{part}": one.cpu().contiguous() for part, one in enumerate(saved)}
        description["layers"].append([len(saved) for saved in state.layers])
    description["rows"] = len(cache.sequences)
    description["sha256"] = _digest(description, tensors)
    path, written = Path(path), Path(f"{path}.{os.getpid()}.part")
    try:
        save_file(tensors, written, metadata={_KEY: json.dumps(description)})
        os.replace(written, path)
    except (OSError, SafetensorError) as error:
        written.unlink(missing_ok=True) if written.parent.is_dir() else None
        raise ValueError(f"{path} cannot be written: {error}") from None


def read(path: str | Path) -> tuple[dict[str, Any], list[list[int]], list[RowState]]:
    """The description, texts, and states by number.

    Raises:
        ValueError: it cannot be read, is something else, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(f"{shown(str(path))} cannot be read as a saved GenerationCache: {error}") from None
    if _KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but no saved GenerationCache")
    try:
        description = json.loads(metadata[_KEY])
        version, digest = description["version"], description.pop("sha256")
        if version == _VERSION and digest == _digest(description, tensors):
            texts = [tensors[f"sequences.{row}"].tolist() for row in range(description["rows"])]
            states = [_state(tensors, at, counts) for at, counts in enumerate(description["layers"])]
            return description, texts, states
    except (ValueError, TypeError, KeyError):
        version = None
    if version not in (None, _VERSION):
        raise ValueError(f"{path} was written by another version of this package ({shown(version)}, not {_VERSION})")
    raise ValueError(f"{path} is damaged: its checksum is another")


def _state(tensors: Mapping[str, torch.Tensor], at: int, counts: list[int]) -> RowState:
    layers = [tuple(tensors[f"{at}.{layer}.{part}"] for part in range(count)) for layer, count in enumerate(counts)]
    return RowState(tensors[f"{at}.tokens"].tolist(), layers)


def _digest(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
