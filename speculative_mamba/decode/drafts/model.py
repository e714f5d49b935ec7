"""A smaller model as the draft."""

import copy

import torch

from ...models.language_model import MambaLM
from ...ops.commit_tokens import BatchState
from ..cache import RowState, new_layers, prefill
from ..sampling import Sampler
from .base import Draft, LanguageModel, Proposal


class ModelDrafter(Draft):
    """A smaller model as the draft, with one cache slot per position like the target's.

    A round's first step takes the last *two* committed tokens, so the draft never lacks one, even after all its tokens
    were accepted; then slot j holds the state before the j-th drafted token's successor, as the target's does.
    """

    capturable = stateful = True

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.vocab_size = model.vocab_size

    def identity(self) -> tuple:
        return super().identity()[1:] if type(self) is ModelDrafter else super().identity()

    def allocate(self, batch: int, lookahead: int, sampler: Sampler, *, captured: bool) -> "ModelDrafter":
        allocated, device = copy.copy(self), self.model.device
        allocated._sampler = sampler
        allocated.layers = new_layers(self.model, batch, lookahead + 1, captured)
        allocated._row_status = torch.zeros(lookahead, batch, dtype=torch.int32, device=device)
        allocated._probs = None
        if sampler.draws and not sampler.coupled:
            shape = batch, lookahead, self.vocab_size
            allocated._probs = torch.empty(shape, dtype=torch.float32, device=device)
        return allocated

    def prefill(self, row: int, text: list[int], state: RowState | None = None) -> None:
        prefill(self.model, self.layers, row, text[:-2], state)

    def propose(self, state: BatchState, lookahead: int) -> Proposal:
        # A text of one token has none before its last.
        left_padding = (state.positions < 2).int()
        logits = self.model.verify(state.last, self.layers, state.slots[0], 0, left_padding)[:, -1]
        tokens = state.last.new_empty(len(state.last), lookahead)
        probs = None if self._probs is None else self._probs[:, :lookahead]
        row_status = self._row_status[:lookahead]
        for step in range(lookahead):
            if step:
                logits = self.model.verify(tokens[:, step - 1 : step], self.layers, state.slots[step], step + 1)[:, -1]
            drawn_from = None if probs is None else probs[:, step]
            tokens[:, step] = self._sampler.draft(logits, tokens[:, :step], drawn_from, row_status[step])
        return Proposal(tokens, probs, row_status=row_status)

    def snapshot(self, row: int, slot: int, text: list[int]) -> RowState:
        return RowState.of(self.layers, row, slot, text[:-2])

    def reserve(self, entries: int) -> bool:
        return isinstance(self.model, MambaLM) and self.model.reserve(self.layers, entries)
