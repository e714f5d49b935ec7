"""Files of a checkpoint folder: what they are, and whether they are still what they were."""

import errno
import json
import os
import stat
import time
import weakref
from pathlib import Path

from ..ops.values import reason

ZIP, LEGACY = (
    b"PK\x03\x04",
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19",
)  # what torch.save writes first: now, before 1.6
_LONGEST_HEADER = 2**30  # bytes; longer than safetensors allows
UNREADABLE = "is truncated, corrupt or not a weights file"
_OTHER_FILES = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull",
    b"GGUF": "is a GGUF file; give its own name instead of the folder's",
    b"<!DOCTYPE": "is a web page; download the file again",
    b"<html": "is a web page; download the file again",
}


def is_there(path: Path) -> bool:
    """Whether a folder has an entry of that name, even one that cannot be read: that is an error, not a file less."""
    return os.path.lexists(path)


def check_regular(path: Path) -> None:
    """
    Raises:
        ValueError: it is a folder, a pipe or a device, of which nobody knows where it ends, or cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is a pipe or a device"
        raise ValueError(f"{path} cannot be read: {what}")


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: missing or not a JSON object.
    """
    if is_there(path):
        check_regular(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except RecursionError:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {reason(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def check_readable(path: Path) -> None:
    """A weights file.

    Raises:
        ValueError: it cannot be read, or is something else by its first bytes.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    for begins, what in _OTHER_FILES.items():
        if start.startswith(begins):
            raise ValueError(f"{path} {what}")
    # After the length of its header a safetensors file has the header, a JSON object.
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _LONGEST_HEADER
    if path.suffix == ".safetensors":
        if start.startswith((ZIP, b"\x80")) and not is_safetensors:
            raise ValueError(f"{path} is a pickled PyTorch file, not safetensors; name it pytorch_model.bin")
        return
    if is_safetensors:
        raise ValueError(f"{path} is a safetensors file; name it model.safetensors")
    if start.startswith(LEGACY):
        raise ValueError(
            f"{path} is in the format of torch.save before PyTorch 1.6, which cannot be mapped; load it with "
            "torch.load(…, weights_only=True) and save it again, best with safetensors.torch.save_file"
        )
    if not start.startswith(ZIP):
        raise ValueError(f"{path} {UNREADABLE}: {'torch.save wrote no such file' if start else 'it is empty'}")


class MappedFile:
    """A file that is mapped into memory: a process that cuts it short or writes over it changes what is read there.

    A file that is deleted, or replaced by another of the same name, does no harm: the mapping keeps the old one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._now()
        self.size = os.fstat(self._descriptor).st_size
        self._looked_at = time.monotonic()

    def check(self, mapped: Path | None = None, every: float = 0.0) -> None:
        """mapped: also compares with what lies there now. every: not again within so many seconds, as looking takes
        microseconds.

        Raises:
            ValueError: the file has been changed since it was mapped.
        """
        now = time.monotonic()
        if now - self._looked_at < every:
            return
        if self._now() != self._state or (mapped is not None and _state_of(mapped.stat()) != self._state):
            raise ValueError(
                f"{self.path} was cut short or written over while the model uses it; load the model again, or with "
                "mmap=False, which copies the weights (write a new file and rename it to replace one in use)"
            )
        self._looked_at = now

    def _now(self) -> tuple[int, ...]:
        return _state_of(os.fstat(self._descriptor))


def _state_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns
