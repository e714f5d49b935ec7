"""The beginnings of texts, read by kernels that run again without Python between them."""

from collections.abc import Sequence

import numpy as np
import torch

from ..layers.cache import Window
from ..ops.recording import Recording, record
from .language_model import MambaLM

SIZES = (16, 32, 64, 128, 256)  # tokens of a part
# Of weights: in a larger model Python takes little of the time, and what is recorded much memory.
MOST_BYTES = 2**30


class Beginnings:
    """Reads the first tokens of texts in a cache of one row, from where their states are copied.

    A text is read in parts of ``SIZES``, the smallest first, with padding before it. What a size calls is recorded when
    a second text has a part of it, so one text alone costs what it did, in time and in memory.

    model: has no attention, and stays as it is meanwhile. slots: of the rows that states are copied to.
    """

    def __init__(self, model: MambaLM, slots: int) -> None:
        self._model, self._slots = model, slots
        self._wanted: set[int] = set()  # sizes
        self._parts: dict[int, _Part] = {}
        self._is_zero = True

    @staticmethod
    def pay_for(model: MambaLM) -> bool:
        return model.backend == "cpu" and model.weight_bytes <= MOST_BYTES

    @torch.no_grad()
    def read(self, tokens: Sequence[int], into: list[torch.Tensor]) -> bool:
        """Leaves the state after some tokens in the layers' ``initial`` views of a row. False: it would not pay, or
        some are no token ids, and nothing was done."""
        padding = -len(tokens) % SIZES[0]
        left = len(tokens) + padding
        sizes = [size for size in SIZES if size & left]
        known = self._wanted.issuperset(sizes)
        self._wanted.update(sizes)
        if not (tokens and known and sum(sizes) == left):
            return False
        # Until the first kernel nothing lets go of Python, for which whoever was just told of a token is waiting.
        ids = np.array([tokens[0]] * padding + list(tokens))
        if ids.min() < 0 or ids.max() >= self._model.vocab_size:
            return False
        if not self._parts:
            cache = list(self._model.new_cache(1, min(self._slots, 2)))  # so that it is of their kind
            self._state = [view for layer in cache for view in layer.initial()]
            self._parts = {size: _Part(self._model, cache, size) for size in SIZES}
        if not self._is_zero:  # the last text broke off
            torch._foreach_zero_(self._state)
        self._is_zero = False
        at = 0
        for size in sizes:
            self._parts[size].run(ids[at : at + size], 0 if at else padding)
            at += size
        torch._foreach_copy_(into, [view[0] for view in self._state])
        torch._foreach_zero_(self._state)
        self._is_zero = True
        return True


class _Part:
    """Reads tokens of one size, recorded the first time."""

    _known: set[tuple] = set()  # noqa: RUF012 - kinds of models of which parts were looked at once in a process

    def __init__(self, model: MambaLM, cache: list, size: int) -> None:
        self._model, self._cache = model, cache
        self._ids = np.empty((1, size), np.int64)
        self._padding = np.zeros(1, np.int32)
        padding = torch.from_numpy(self._padding)
        self._window = Window(
            torch.zeros(1, dtype=torch.int32), left_padding=padding, final_state_only=True, fused=model.fused_layers
        )
        self._recording: Recording | None = None

    def run(self, ids: np.ndarray, padding: int) -> None:
        self._ids[0], self._padding[0] = ids, padding
        if self._recording is not None:
            self._recording.run(unchanged=True)
            return
        model, kind = self._model, self._model.step_kind
        _, self._recording = record(
            model.norm_weight, model.read_part, torch.from_numpy(self._ids), self._cache, self._window,
            known=kind in self._known,
        )  # fmt: skip
        self._known.add(kind)
