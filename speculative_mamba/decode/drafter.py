"""Who proposes tokens."""

from typing import Protocol

import torch

from ..models.language_model import MambaLM
from .cache import RowState, absorb
from .sampling import Sampler


class LanguageModel(Protocol):
    """What the loop asks of a model; ``MambaLM`` documents each."""

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
        null_columns: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class Drafter(Protocol):
    """Proposes tokens for every row of a batch. Any class with these methods and ``vocab_size`` is a draft."""

    vocab_size: int

    def begin(self, prompts: list[list[int]], lookahead: int, sampler: Sampler) -> None:
        """A new batch: rows of token ids, and at most ``lookahead`` tokens a round.

        ``sampler.draft`` draws tokens from logits by the run's law and seed.
        """

    def propose(
        self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafts up to ``lookahead`` tokens after each row's committed text.

        rows: all committed tokens. accepted: (B) int32, how many tokens of the last round's draft were accepted
        (0 at first). Returns tokens (B, k) int64, 0 <= k <= lookahead, and the laws (B, k, V) float32 they were drawn
        from; None when they were not drawn at random (then the loop takes each as certain).
        """


class ModelDrafter:
    """A smaller model as the draft, with one cache slot per position like the target's.

    A round's first step takes the last *two* committed tokens, so the draft never lacks one, even after all its tokens
    were accepted; then slot j holds the state before the j-th drafted token's successor, as the target's does.
    """

    def __init__(self, model: LanguageModel, states: list[RowState | None] | None = None) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self._states = states

    def begin(self, prompts: list[list[int]], lookahead: int, sampler: Sampler) -> None:
        self._sampler = sampler
        self._cache = self.model.new_cache(len(prompts), lookahead + 1)
        slots = torch.arange(lookahead + 1, dtype=torch.int32, device=self.model.device)
        self._slots = slots[:, None].repeat(1, len(prompts))  # row s: slot s for every row of the batch
        self._laws = None
        if not sampler.sampling.greedy and not sampler.coupled:
            self._laws = torch.empty(len(prompts), lookahead, self.vocab_size, device=self.model.device)
        # A one-token prompt has no token before its last: a null column stands for it, in the first round.
        self._null_columns = torch.tensor(
            [int(len(prompt) < 2) for prompt in prompts], dtype=torch.int32, device=self.model.device
        )
        for row, prompt in enumerate(prompts):
            absorb(self.model, self._cache, row, prompt[:-2], self._states[row] if self._states else None)

    def propose(
        self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        device = self.model.device
        last_two = torch.tensor([[row[-2] if len(row) > 1 else 0, row[-1]] for row in rows], device=device)
        null_columns = self._null_columns
        self._null_columns = None
        logits = self.model.verify(last_two, self._cache, accepted, 0, null_columns)[:, -1]
        tokens = torch.empty(len(rows), lookahead, dtype=torch.int64, device=device)
        laws = None if self._laws is None else self._laws[:, :lookahead]
        for step in range(lookahead):
            if step:
                logits = self.model.verify(tokens[:, step - 1 : step], self._cache, self._slots[step], step + 1)[:, -1]
            tokens[:, step] = self._sampler.draft(logits, tokens[:, :step], None if laws is None else laws[:, step])
        return tokens, laws

    def catch_up(self, row: int, text: list[int], slot: int, length: int) -> None:
        """Absorbs what a row gained in rounds without a draft; ``propose`` then goes on from slot 0.

        slot, length: where the row stood, and the length of its text, when the draft was last asked.
        """
        absorb(self.model, self._cache, row, text[:-2], self.state(row, slot, length))
        if self._null_columns is not None:
            self._null_columns[row] = int(len(text) < 2)

    def state(self, row: int, slot: int, length: int) -> RowState:
        """A copy of the state in a slot from which a text of ``length`` tokens would be continued."""
        return RowState.of(self._cache, row, slot, max(length - 2, 0))


def as_drafter(draft: "Drafter | MambaLM | LanguageModel", states: list[RowState | None] | None = None) -> Drafter:
    """A draft model becomes a drafter, going on from saved states; anything that proposes already is one."""
    return draft if hasattr(draft, "propose") else ModelDrafter(draft, states)
