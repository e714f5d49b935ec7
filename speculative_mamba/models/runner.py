"""A model at work on the rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..layers.cache import AttentionCache
from .beginnings import Beginnings
from .language_model import MambaLM, ModelCache

# One layer's recurrent state after some token, and the convolution's inputs before the next (see ``MambaCache``).
LayerState = tuple[torch.Tensor, ...]


@runtime_checkable
class LanguageModel(Protocol):
    """What is asked of a model; ``MambaLM`` documents each."""

    vocab_size: int
    eos_token_id: int | tuple[int, ...] | None
    device: torch.device

    def new_cache(self, batch: int, slots: int) -> list: ...
    def prefill(self, tokens: list[int], cache: list, row: int) -> None: ...
    def verify(
        self,
        tokens: torch.Tensor,
        cache: list,
        start_slot: torch.Tensor,
        write_slot: int = 0,
        left_padding: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass
class RowState:
    """What a model has in mind after it has read ``tokens``, the first of a row's text."""

    tokens: list[int]
    layers: list[LayerState]


class ModelRunner:
    """A model, which stays as it is meanwhile, and its cache for rows that come and go.

    layers: the cache. captured: its steps are captured or recorded from outside, so not by the model.
    """

    def __init__(self, model: LanguageModel, batch: int, slots: int, *, captured: bool = False) -> None:
        self.model = model
        self.layers = model.new_cache(batch, slots)
        if isinstance(self.layers, ModelCache):
            self.layers.watches_model = False
            self.layers = list(self.layers) if captured else self.layers
        self._initial = [view for layer in self.layers for view in layer.initial()]
        self._growing = [layer for layer in self.layers if isinstance(layer, AttentionCache)]
        self._used: set[int] = set()  # rows that had a text
        self._empty: set[int] = set()  # rows whose text has not begun
        records = isinstance(model, MambaLM) and self._initial and not self._growing and Beginnings.pay_for(model)
        self._beginnings = Beginnings(model, slots) if records else None

    def prefill(self, row: int, tokens: Sequence[int], state: RowState | None = None) -> None:
        """Brings slot 0 of a row to the state after ``tokens``, of which ``state`` has read some."""
        self.reset(row, state)
        self.read(row, tokens[0 if state is None else len(state.tokens) :])

    def reset(self, row: int, state: RowState | None = None) -> None:
        """Puts ``state`` into slot 0 of a row; None: that of an empty text, once ``read`` is called."""
        if state is None:
            self._empty.add(row)
            return
        self._empty.discard(row)
        self._used.add(row)  # also if this breaks off
        for layer, saved in zip(self.layers, state.layers, strict=True):
            layer.restore(row, saved)

    def read(self, row: int, tokens: Sequence[int]) -> None:
        """Reads more tokens, or none, behind the state in slot 0 of a row.

        Raises:
            ValueError: a file in which weights lie was changed.
        """
        if isinstance(self.model, MambaLM):
            self.model.before_step([], 0, files_every=0.0)  # where no token is read, nothing else looks
        if row in self._empty:
            initial, used = [view[row] for view in self._initial], row in self._used
            self._used.add(row)  # also if what follows breaks off
            if self._beginnings is not None and self._beginnings.read(tokens, initial):
                tokens = ()
            elif used and initial:
                torch._foreach_zero_(initial)
            self._empty.discard(row)
        if tokens:
            self.model.prefill(tokens, self.layers, row)

    def snapshot(self, row: int, slot: int, tokens: list[int]) -> RowState:
        """A copy of the state in a row's slot, which is that after ``tokens``."""
        return RowState(tokens, [layer.snapshot(row, slot) for layer in self.layers])

    def before_step(self, tokens: int) -> list[int]:
        """``MambaLM.before_step``, for a step of so many tokens that is captured or recorded from outside."""
        return self.model.before_step(self._growing, tokens) if isinstance(self.model, MambaLM) else []

    def reserve(self, entries: int) -> bool:
        """Makes memory for texts of so many tokens. Whether anything moved."""
        return isinstance(self.model, MambaLM) and self.model.reserve(self.layers, entries)
