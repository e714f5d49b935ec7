"""Who proposes tokens."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..models.language_model import MambaLM
from ..ops.commit_tokens import RowPlaces
from .cache import RowState, absorb
from .sampling import Sampler


@runtime_checkable
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


@runtime_checkable
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

        rows: all committed tokens, in lists of the drafter's own. accepted: (B) int32, how many tokens of the last
        round's draft were accepted (0 at first). Returns tokens (B, k) int64, 0 <= k <= lookahead, and the laws
        (B, k, V) float32 they were drawn from; None when they were not drawn at random (then the loop takes each as
        certain).
        """


@dataclass
class Proposal:
    """What was drafted for a batch. tokens: (B, k) int64. laws: (B, k, V) float32 they were drawn from, or None.
    limits: (B) int32, how many of a row's tokens count."""

    tokens: torch.Tensor
    laws: torch.Tensor | None
    limits: torch.Tensor


class Proposer(ABC):
    """Drafts within a round: nothing it does depends on a value that the host would have to read.

    text: (B, L) int64, where committed tokens are to be written, or None. model: whose weights it reads, or None;
    layers: that model's cache.
    """

    text: torch.Tensor | None = None
    model: LanguageModel | None = None
    layers: Sequence = ()

    @abstractmethod
    def prepare(self, batch: int, lookahead: int, sampler: Sampler, replayed: bool) -> "Proposer":
        """A copy with memory of its own for batches of this size. replayed: see ``Round``."""

    @abstractmethod
    def absorb(self, texts: list[list[int]]) -> None:
        """All rows go on from these tokens."""

    def reserve(self, entries: int) -> bool:
        """Makes room for texts of so many tokens. Whether anything moved."""
        return False

    def tensors(self) -> list[torch.Tensor]:
        """Its memory."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    @abstractmethod
    def draft(self, places: RowPlaces, lookahead: int, verdicts: torch.Tensor) -> Proposal:
        """Up to ``lookahead`` tokens a row. verdicts: (lookahead, B) int32, written: those of ``sample_tokens``."""


class ModelDrafter(Proposer):
    """A smaller model as the draft, with one cache slot per position like the target's.

    A round's first step takes the last *two* committed tokens, so the draft never lacks one, even after all its tokens
    were accepted; then slot j holds the state before the j-th drafted token's successor, as the target's does.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self.states: list[RowState | None] | None = None  # that ``absorb`` goes on from

    @property
    def device(self) -> torch.device:
        return self.model.device

    def begin(self, prompts: list[list[int]], lookahead: int, sampler: Sampler) -> None:
        self._allocate(len(prompts), lookahead, sampler, replayed=False)
        self.absorb(prompts)

    def prepare(self, batch: int, lookahead: int, sampler: Sampler, replayed: bool) -> "ModelDrafter":
        prepared = copy.copy(self)
        prepared._allocate(batch, lookahead, sampler, replayed)
        return prepared

    def _allocate(self, batch: int, lookahead: int, sampler: Sampler, replayed: bool) -> None:
        device = self.model.device
        self._sampler = sampler
        self.layers = self.model.new_cache(batch, lookahead + 1)
        if replayed:
            self.layers = list(self.layers)
        slots = torch.arange(lookahead + 1, dtype=torch.int32, device=device)
        self._slots = slots[:, None].repeat(1, batch)  # row s: slot s for every row of the batch
        self._laws = None
        if sampler.draws and not sampler.coupled:
            self._laws = torch.empty(batch, lookahead, self.vocab_size, dtype=torch.float32, device=device)

    def absorb(self, texts: list[list[int]]) -> None:
        """Reads each row's text but for its last two tokens, from the fresh state on or from that of ``states``."""
        for row, text in enumerate(texts):
            absorb(self.model, self.layers, row, text[:-2], self.states[row] if self.states else None)

    def reserve(self, entries: int) -> bool:
        return isinstance(self.model, MambaLM) and self.model.reserve(self.layers, entries)

    def propose(
        self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        last_two = [[row[-2] if len(row) > 1 else 0, row[-1]] for row in rows]
        slots = [accepted, *self._slots[1:]]
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
        last_two = torch.tensor(last_two, dtype=torch.int64, device=device)
        return self._draft(last_two, lengths, slots, lookahead)

    def draft(self, places: RowPlaces, lookahead: int, verdicts: torch.Tensor) -> Proposal:
        tokens, laws = self._draft(places.last, places.positions, places.slots, lookahead, verdicts)
        return Proposal(tokens, laws, places.room)

    def _draft(
        self,
        last_two: torch.Tensor,
        lengths: torch.Tensor,
        slots: Sequence[torch.Tensor],
        lookahead: int,
        verdicts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # A text of one token has none before its last: a null column stands for it.
        null_columns = (lengths < 2).int()
        logits = self.model.verify(last_two, self.layers, slots[0], 0, null_columns)[:, -1]
        tokens = last_two.new_empty(len(last_two), lookahead)
        laws = None if self._laws is None else self._laws[:, :lookahead]
        for step in range(lookahead):
            if step:
                logits = self.model.verify(tokens[:, step - 1 : step], self.layers, slots[step], step + 1)[:, -1]
            tokens[:, step] = self._sampler.draft(
                logits, tokens[:, :step], None if laws is None else laws[:, step],
                None if verdicts is None else verdicts[step],
            )  # fmt: skip
        return tokens, laws

    def catch_up(self, row: int, text: list[int], slot: int, length: int) -> None:
        """Absorbs what a row gained in rounds without a draft; ``propose`` then goes on from slot 0.

        slot, length: where the row stood, and the length of its text, when the draft was last asked.
        """
        absorb(self.model, self.layers, row, text[:-2], self.state(row, text[:length], slot))

    def state(self, row: int, text: list[int], slot: int) -> RowState:
        """A copy of the state in a slot from which a text would be continued."""
        return RowState.of(self.layers, row, slot, text[:-2])
