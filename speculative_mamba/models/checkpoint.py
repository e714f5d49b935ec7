"""load_model: from a folder, a hub id or the embedded pair to a model."""

import re
from pathlib import Path

import torch

from ..ops import backend as backends
from ..ops.int8 import Int8Weight, quantised
from .builder import build
from .formats import parse_config
from .language_model import CHECKPOINTS, MambaLM
from .tokenizer import load_tokenizer
from .weights import read_json, read_tensors, release_pages

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_DTYPES = {**DTYPES, "int8": torch.int8}
BUILTIN = ("target", "draft")
_MAMBA_CONFIG = "mamba_config.json"
_CONFIG_FILES = ("config.json", "tokenizer.json", _MAMBA_CONFIG)


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    state_dtype: str | torch.dtype | None = None,
    checkpoint: str = "auto",
    device: str = "cpu",
    backend: str = "auto",
) -> MambaLM:
    """Loads a language model: Mamba-1, Mamba-2, Falcon-Mamba, Llama, or a hybrid of Mamba and attention.

    Args:
        source: ``"builtin:target"`` or ``"builtin:draft"``, a folder, or a hub id (``"state-spaces/mamba-2.8b"``). A
            folder holds ``config.json`` and weights in state-spaces format (``pytorch_model.bin``; also Mamba-2 and
            ``mamba2attn``) or Hugging Face format (``model.safetensors``, also sharded; ``MambaForCausalLM``,
            ``Mamba2ForCausalLM``, ``FalconMambaForCausalLM``, ``LlamaForCausalLM``, or with ``mamba_config.json`` a
            hybrid of *The Mamba in the Llama*), and for text ``tokenizer.json``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` for the weights; None keeps the stored one,
            which needs no copy: the weights stay in the mapped file. With ``"int8"`` the matrices and the embedding
            are rounded to int8 with a scale per row, one by one, and the rest keeps its stored dtype. A, D and the dt
            bias are float32 always, as is all arithmetic.
        state_dtype: the first three for the recurrent state, which is rounded after every token, and for cached keys
            and values; None is float32, whatever the weights are. Half the memory, but errors add up over the text, and
            a float16 state beyond 65504 becomes infinite.
        checkpoint: how a Mamba layer can go back to any token of a window: ``"states"`` keeps the state after each,
            ``"inputs"`` one state and each token's inputs, and computes again what was accepted. Text and logits are
            the same bit for bit; ``"auto"`` takes what is faster for the model and the batch.
        device: ``"cpu"`` or ``"cuda"``.
        backend: ``"auto"``, ``"cpu"`` (C++ kernels), ``"cuda"`` (CUDA C++), ``"triton"`` or ``"reference"`` (PyTorch).
            With the two for GPUs activations have the dtype of the weights, with the others they are float32.

    Raises:
        ValueError: anything in the list above is missing, broken, unknown, or does not fit the rest.
    """
    dtype, torch_device = parse_dtype(dtype, "dtype", WEIGHT_DTYPES), parse_device(device)
    state_dtype = parse_dtype(state_dtype, "state_dtype", DTYPES) or torch.float32
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"unknown checkpoint {checkpoint!r}; choose from: {', '.join(CHECKPOINTS)}")
    backend = backends.resolve(backend, torch_device.type)
    folder, is_hub = find_folder(str(source))
    raw_config, mamba_config = read_json(folder / "config.json"), None
    if (folder / _MAMBA_CONFIG).is_file():
        mamba_config = read_json(folder / _MAMBA_CONFIG)
    try:
        config, names = parse_config(raw_config, mamba_config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from None
    tensors = _CheckpointTensors(folder, read_tensors(folder), dtype, torch_device)
    model = build(config, names, tensors, backend)
    model.name, model.state_dtype, model.checkpoint = str(source), state_dtype, checkpoint
    # State-spaces checkpoints come without the tokenizer they were trained with, gpt-neox-20b's.
    fall_back = "model_type" not in raw_config or (is_hub and raw_config["model_type"] == "mamba")
    model.load_tokenizer = lambda: load_tokenizer(folder, fall_back, _download)
    return model


def parse_dtype(dtype: str | torch.dtype | None, name: str, known: dict[str, torch.dtype]) -> torch.dtype | None:
    if dtype is None or dtype in known.values():
        return dtype
    if dtype not in known:
        raise ValueError(f"unknown {name} '{dtype}'; choose from: {', '.join(known)}")
    return known[dtype]


def parse_device(device: str) -> torch.device:
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device '{device}'; choose from: cpu, cuda") from None
    if parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{device}' is not supported; choose from: cpu, cuda")
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use device cpu")
    if parsed.type == "cuda" and parsed.index is not None and parsed.index >= torch.cuda.device_count():
        raise ValueError(f"device '{device}' does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
    return parsed


def find_folder(source: str) -> tuple[Path, bool]:
    """The folder of a model, downloaded if ``source`` is a hub id; and whether it was."""
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in BUILTIN:
            raise ValueError(f"unknown embedded model '{source}'; choose from: builtin:target, builtin:draft")
        return Path(__file__).parent / "builtin" / name, False
    path = Path(source).expanduser()
    if path.is_dir():
        return path, False
    if path.exists():
        raise ValueError(f"{source} is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise ValueError(f"folder {source} does not exist, and it is no hub id (owner/name)")
    folder = _download(source, [*_CONFIG_FILES, "model*.safetensors*"])
    if not list(folder.glob("*.safetensors")):
        folder = _download(source, [*_CONFIG_FILES, "pytorch_model*"])
    return folder, True


def _download(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"no folder {repository} here, and the hub does not give it ({type(error).__name__}: {reason}); check the "
            f"name and the network, or download it elsewhere and give the path of the folder"
        ) from None


class _CheckpointTensors:
    """The tensors of a folder: shapes checked against the config, those converted that need it."""

    def __init__(
        self, folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None, device: torch.device
    ) -> None:
        self.folder, self.tensors, self.dtype, self.device = folder, tensors, dtype, device

    def has(self, name: str) -> bool:
        return name in self.tensors

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor | Int8Weight:
        stored = self._stored(name, shape)
        stored = stored if rows is None else stored[rows]
        if self.dtype is not torch.int8:
            return self._converted(stored, self._dtype_of(stored))
        try:
            weight = quantised(stored)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {name}: {error}") from None
        if stored.is_contiguous():
            release_pages(stored)
        return Int8Weight(weight.values.to(self.device), weight.scale.to(self.device))

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        stored = self._stored(name, shape)
        return self._converted(stored, self._dtype_of(stored))

    def float32(self, name: str, *shape: int) -> torch.Tensor:
        return self._converted(self._stored(name, shape), torch.float32)

    def _dtype_of(self, stored: torch.Tensor) -> torch.dtype:
        as_stored = stored.dtype if stored.dtype in DTYPES.values() else torch.float32
        return as_stored if self.dtype in (None, torch.int8) else self.dtype

    def _converted(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tensor = stored.to(self.device, dtype).contiguous()
        if tensor.data_ptr() != stored.data_ptr() and stored.is_contiguous():
            release_pages(stored)
        return tensor

    def _stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored = self.tensors.get(name)
        if stored is None:
            raise ValueError(f"{self.folder}: the weights lack {name}, which config.json calls for")
        if stored.shape != shape:
            raise ValueError(f"{self.folder}: {name} has shape {tuple(stored.shape)}, but config.json gives {shape}")
        return stored
