"""A smaller model as the draft."""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch

from ...models.language_model import MambaLM
from ...models.runner import LanguageModel, ModelRunner, RowState
from ...ops.commit_tokens import BatchState
from ...ops.recording import torch_op
from ..sampling import Sampler
from .base import Draft, Proposal


class _Step(NamedTuple):
    """One token of a proposal, as views of its memory. before: those drafted before it. window: the token as (B, 1)."""

    index: int
    before: torch.Tensor
    token: torch.Tensor
    window: torch.Tensor
    probs: torch.Tensor | None
    row_status: torch.Tensor


class ModelDrafter(Draft):
    """A smaller model as the draft, with one cache slot per position like the target's.

    A round's first step takes the last *two* committed tokens, so the draft never lacks one, even after all its tokens
    were accepted; then slot j holds the state before the j-th drafted token's successor, as the target's does.
    """

    capturable = stateful = True

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self.recordable = type(self) is ModelDrafter and isinstance(model, MambaLM) and model.recordable

    def identity(self) -> tuple:
        return super().identity()[1:] if type(self) is ModelDrafter else super().identity()

    def allocate(self, batch: int, lookahead: int, sampler: Sampler, *, captured: bool) -> "ModelDrafter":
        allocated, device = copy.copy(self), self.model.device
        allocated._sampler = sampler
        allocated._runner = ModelRunner(self.model, batch, lookahead + 1, captured=captured)
        allocated.layers = allocated._runner.layers
        allocated._steps = {}
        allocated._row_status = torch.zeros(lookahead, batch, dtype=torch.int32, device=device)
        allocated._probs = None
        if sampler.draws and not sampler.coupled:
            shape = batch, lookahead, self.vocab_size
            allocated._probs = torch.empty(shape, dtype=torch.float32, device=device)
        return allocated

    def prefill(self, row: int, text: list[int], state: RowState | None = None) -> None:
        self._runner.prefill(row, text[:-2], state)

    def propose(self, state: BatchState, lookahead: int) -> Proposal:
        if lookahead not in self._steps:
            self._steps[lookahead] = self._allocate_steps(lookahead)
        proposal, steps = self._steps[lookahead]
        # A text of one token has none before its last.
        left_padding = torch.empty_like(state.remaining)
        torch_op(torch.lt, state.positions, 2, out=left_padding)
        window, write_slot = state.last, 0
        for step in steps:
            logits = self.model.verify(window, self.layers, state.slots[step.index], write_slot, left_padding)[:, -1]
            token = self._sampler.draft(logits, step.before, step.probs, step.row_status)
            torch_op(torch.Tensor.copy_, step.token, token)
            window, write_slot, left_padding = step.window, step.index + 2, None
        return replace(proposal)

    def _allocate_steps(self, lookahead: int) -> tuple[Proposal, list["_Step"]]:
        tokens = torch.empty(self._row_status.shape[1], lookahead, dtype=torch.int64, device=self.model.device)
        probs = None if self._probs is None else self._probs[:, :lookahead]
        proposal = Proposal(tokens, probs, row_status=self._row_status[:lookahead])
        steps = [
            _Step(
                index, tokens[:, :index], tokens[:, index], tokens[:, index : index + 1],
                None if probs is None else probs[:, index], self._row_status[index],
            )
            for index in range(lookahead)
        ]  # fmt: skip
        return proposal, steps

    def before_propose(self, lookahead: int) -> list[int]:
        return self._runner.before_step(lookahead + 1)

    def snapshot(self, row: int, slot: int, text: list[int]) -> RowState:
        return self._runner.snapshot(row, slot, text[:-2])

    def reserve(self, entries: int) -> bool:
        return self._runner.reserve(entries)
