"""Parts of rounds whose kernels run again without Python between them."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..ops.recording import Recording, record

_Result = TypeVar("_Result")


class RecordedParts:
    """Calls functions of ops and ``torch_op``; from the second call with a key on, what was recorded of the first.

    kind: of what is done. What parts of one kind and key call is looked at once in a process.
    """

    _known: set[tuple] = set()  # noqa: RUF012 - shared on purpose

    def __init__(self, like: torch.Tensor, kind: tuple) -> None:
        self._like, self._kind = like, kind
        self._parts: dict[tuple, tuple[Recording, object]] = {}
        self._places: dict[str, object] = {}

    def work_on(self, name: str, places: object) -> None:
        """Where memory lies that may move, of a name: parts that were recorded on another are forgotten."""
        if self._places.setdefault(name, places) != places:
            self._parts.clear()
            self._places[name] = places

    def run(self, key: tuple, function: Callable[..., _Result], *arguments: object) -> _Result:
        """What the function returned the first time, as it is now."""
        if part := self._parts.get(key):
            recording, result = part
            recording.run(unchanged=True)
            return result
        kind = *key, self._kind
        result, recording = record(self._like, function, *arguments, known=kind in self._known)
        self._known.add(kind)
        self._parts[key] = recording, result
        return result
