"""Where a model is: the embedded pair's folder, a local one or a GGUF file, or a folder that is downloaded from the hub
in two steps."""

import re
from pathlib import Path

from ..ops.values import shown
from .chat import CHAT_TEMPLATE, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from .files import check_regular, is_there, read_json
from .gguf import MAGIC
from .weights import check_unpickling

BUILTIN = ("target", "draft")
GENERATION_CONFIG, MAMBA_CONFIG = "generation_config.json", "mamba_config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_TEXT_FILES = [
    "config.json",
    GENERATION_CONFIG,
    MAMBA_CONFIG,
    _ADAPTER_CONFIG,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    CHAT_TEMPLATE,
]


def find_model(source: object, revision: object = None) -> tuple[Path, bool]:
    """The folder or the GGUF file of a model, and whether it is a hub id, of which everything but the weights is
    downloaded.

    Raises:
        ValueError: there is no such model, or ``source`` is something else; or what is no hub id has a ``revision``.
    """
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise ValueError(f"revision must be a branch, a tag or a commit, got {shown(revision)}")
    if not isinstance(source, str | Path) or not str(source):
        got = shown(source) if isinstance(source, str | Path) else type(source).__name__
        how = "; from_transformers takes models" if hasattr(source, "save_pretrained") else ""
        raise ValueError(
            f"load_model takes a folder, a GGUF file, a hub id, builtin:target or builtin:draft, got {got}{how}"
        )
    source = str(source)
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in BUILTIN:
            raise ValueError(f"unknown embedded model '{source}'; choose from: builtin:target, builtin:draft")
        _refuse_revision(revision, source)
        return Path(__file__).parent / "builtin" / name, False
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, ~ of a user who does not exist
        raise ValueError(f"{shown(source)} is no name of a folder: {error}") from None
    if is_folder:
        _refuse_revision(revision, f"folder {source}")
        _refuse_adapters(path)
        return path, False
    if is_file:
        check_regular(path)
        if path.suffix != ".gguf" and not _begins_with(path, MAGIC):
            raise ValueError(
                f"{source} is a file, but no GGUF file; give the folder that holds config.json and the weights"
            )
        _refuse_revision(revision, f"file {source}")
        return path, False
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        what = "file" if source.endswith(".gguf") else "folder"
        raise ValueError(f"{what} {shown(source)} does not exist, and it is no hub id (owner/name)")
    folder = download(source, _TEXT_FILES, revision)
    _refuse_adapters(folder)
    return folder, True


def fetch_weights(repository: str, folder: Path) -> None:
    """Downloads the weights of a hub id, of the same commit, into the folder that ``find_model`` gave.

    Raises:
        ValueError: it cannot be downloaded, or has only weights that are not safe to read here.
    """
    download(repository, ["model*.safetensors*"], folder.name)
    if not list(folder.glob("*.safetensors")):
        check_unpickling(repository)
        download(repository, ["pytorch_model*"], folder.name)


def download(repository: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of a commit of a hub id, with its files of these patterns. revision: a branch, a tag or a commit; None
    is the newest commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        it = "it" if revision is None else f"its revision {shown(revision)}"
        raise ValueError(
            f"no folder {repository} here, and the hub does not give {it} ({type(error).__name__}: {reason}); "
            "check the name and the network, or download it elsewhere and give the path of the folder"
        ) from None


def read_configs(folder: Path) -> tuple[dict, dict | None, dict]:
    """``config.json``, and if they are there ``mamba_config.json`` and ``generation_config.json``."""
    mamba, generation = folder / MAMBA_CONFIG, folder / GENERATION_CONFIG
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    if gguf is not None and not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; to load a GGUF file in it give its own name, such as {gguf}")
    return (
        read_json(folder / "config.json"),
        read_json(mamba) if is_there(mamba) else None,
        read_json(generation) if is_there(generation) else {},
    )


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _refuse_revision(revision: str | None, source: str) -> None:
    if revision is not None:
        raise ValueError(f"only a hub id has revisions, but revision {shown(revision)} was asked of {source}")


def _refuse_adapters(folder: Path) -> None:
    if is_there(folder / _ADAPTER_CONFIG):
        raise ValueError(
            f"{folder} has {_ADAPTER_CONFIG}: adapters are not supported; merge them into the weights "
            "(peft: merge_and_unload) and save the model"
        )
