"""Any plain Python drafter as a draft."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from ...models.runner import RowState
from ...ops.checks import check_tokens
from ...ops.commit_tokens import BatchState
from ..sampling import Sampler
from .base import Draft, Proposal


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens for every row of a batch. Any class with these methods and ``vocab_size`` is a draft."""

    vocab_size: int

    def begin(self, prompts: list[list[int]], lookahead: int, sampler: Sampler) -> None:
        """A new batch, or other rows in it: texts as token ids, and at most ``lookahead`` tokens a round.

        ``sampler.draft`` draws tokens from logits by the run's parameters and seed.
        """

    def propose(
        self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafts up to ``lookahead`` tokens after each row's committed text.

        rows: all committed tokens, in lists of the drafter's own. accepted: (B) int32, how many tokens of the last
        round's draft were accepted (0 at first). Returns tokens (B, k) int64, 0 <= k <= lookahead, and the
        probabilities (B, k, V) float32 they were drawn from; None when they were not drawn at random (then the loop
        takes each as certain).
        """


class PythonDraft(Draft):
    """A ``Drafter`` in rounds: it is told the committed texts, which the host has to know by then."""

    def __init__(self, drafter: Drafter, texts: Callable[[], list[list[int]]]) -> None:
        self.drafter, self.vocab_size = drafter, drafter.vocab_size
        self._texts = texts

    def allocate(self, batch: int, lookahead: int, sampler: Sampler, *, captured: bool) -> "PythonDraft":
        self._lookahead, self._sampler, self._knows_rows = lookahead, sampler, False
        return self

    def prefill(self, row: int, text: list[int], state: RowState | None = None) -> None:
        self._knows_rows = False

    def ready(self) -> None:
        if not self._knows_rows:
            self.drafter.begin([list(text) for text in self._texts()], self._lookahead, self._sampler)
            self._knows_rows = True

    def rows(self) -> list[list[int]]:
        """Texts that the drafter may change."""
        return [list(text) for text in self._texts()]

    def propose(self, state: BatchState, lookahead: int) -> Proposal:
        rows = self.rows()
        proposal = self.drafter.propose(rows, state.slots[0].clamp(min=0), lookahead)
        if not isinstance(proposal, tuple) or len(proposal) != 2:
            raise ValueError(f"the draft's propose must return (tokens, probs), got {type(proposal).__name__}")
        tokens, probs = proposal
        self._check(tokens, probs, len(rows), lookahead)
        return Proposal(tokens.to(state.last.device).contiguous(), probs)

    def _check(self, tokens: torch.Tensor, probs: torch.Tensor | None, rows: int, lookahead: int) -> None:
        for name, value in (("tokens", tokens), ("probs", probs)):
            if not isinstance(value, torch.Tensor) and not (value is None and name == "probs"):
                raise ValueError(f"the draft proposed {name} as {type(value).__name__}; expected a tensor")
        shape = tuple(tokens.shape)
        if len(shape) != 2 or shape[0] != rows or shape[1] > lookahead:
            raise ValueError(f"the draft proposed tokens of shape {shape}; expected ({rows}, k), k at most {lookahead}")
        check_tokens("the draft's proposal", tokens.contiguous(), shape, self.vocab_size, tokens)
        if probs is not None and probs.shape != (*shape, self.vocab_size):
            expected = *shape, self.vocab_size
            raise ValueError(f"the draft gave probs of shape {tuple(probs.shape)}; expected {expected}")
