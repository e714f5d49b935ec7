"""States of texts that were read before, for prompts that begin with them."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..models.runner import RowState


class _Entry(NamedTuple):
    """What target and draft had in mind of one text; the draft's has read a token less, or is not there."""

    target: RowState
    draft: RowState | None
    nbytes: int


class PrefixCache:
    """States at the ends of prompts and of turns, of which the longest is found that a prompt begins with.

    A recurrent state cannot be cut, so only a whole text of the cache is of use. Keys and values of attention layers
    are kept beside the states. When all take more than ``max_bytes``, what was used least recently goes first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by the hash of the target's tokens

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: Sequence[int]) -> tuple[RowState | None, RowState | None]:
        """States of target and draft of the longest text that a prompt goes beyond."""
        found = None
        for length, key in enumerate(_hashes(prompt[:-1]) if self._entries else (), 1):
            entry = self._entries.get(key)
            if entry is not None and entry.target.tokens == prompt[:length]:
                found = key
        if found is None:
            return None, None
        self._entries.move_to_end(found)
        entry = self._entries[found]
        return entry.target, entry.draft

    def store(self, target: RowState | None, draft: RowState | None) -> None:
        """Keeps the states of a text, unless they alone are too large."""
        if target is None or not target.tokens:
            return
        [*_, key] = _hashes(target.tokens)
        known = self._entries.get(key)
        if draft is None and known is not None and known.target.tokens == target.tokens:
            draft = known.draft
        entry = _Entry(target, draft, _nbytes(target) + (0 if draft is None else _nbytes(draft)))
        if entry.nbytes > self.max_bytes:
            return
        self.nbytes += entry.nbytes - (0 if known is None else known.nbytes)
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while self.nbytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.nbytes -= oldest.nbytes


def _hashes(tokens: Sequence[int]) -> Iterator[int]:
    """Of the first 1, 2, … tokens."""
    key = 0
    for token in tokens:
        key = hash((key, token))
        yield key


def _nbytes(state: RowState) -> int:
    """Of the tensors, and of a list of numbers."""
    return sum(part.nbytes for layer in state.layers for part in layer) + 8 * len(state.tokens)
