"""Drafters in a round: one that has to be told the text, and prompt lookup on the device."""

import copy

import torch

from ..models.language_model import MambaLM
from ..ops.checks import check_tokens
from ..ops.commit_tokens import RowPlaces
from .drafter import Drafter, LanguageModel, ModelDrafter, Proposal, Proposer
from .ngram import NgramDrafter
from .sampling import Sampler


class HostProposer(Proposer):
    """A ``Drafter`` in a round: it is told the committed texts, which the host has to know by then."""

    def __init__(self, drafter: Drafter, texts: list[list[int]], vocabulary: int) -> None:
        self.drafter, self._texts, self._vocabulary = drafter, texts, vocabulary

    def prepare(self, batch: int, lookahead: int, sampler: Sampler, replayed: bool) -> "HostProposer":
        self._lookahead, self._sampler = lookahead, sampler
        return self

    def absorb(self, texts: list[list[int]]) -> None:
        self.drafter.begin([list(text) for text in texts], self._lookahead, self._sampler)

    def draft(self, places: RowPlaces, lookahead: int, verdicts: torch.Tensor) -> Proposal:
        texts = self._texts if is_ngram(self.drafter) else [list(text) for text in self._texts]
        proposal = self.drafter.propose(texts, places.slots[0].clamp(min=0), lookahead)
        if not isinstance(proposal, tuple) or len(proposal) != 2:
            raise ValueError(f"the draft's propose must return (tokens, laws), got {type(proposal).__name__}")
        tokens, laws = proposal
        check_drafted(tokens, laws, len(self._texts), lookahead, self._vocabulary)
        limits = places.room
        if isinstance(self.drafter, NgramDrafter):
            counts = torch.tensor(self.drafter.counts, dtype=torch.int32, device=limits.device)
            limits = torch.minimum(limits, counts)
        verdicts.zero_()
        return Proposal(tokens.to(limits.device).contiguous(), laws, limits)


def check_drafted(drafted: torch.Tensor, laws: torch.Tensor | None, rows: int, lookahead: int, vocabulary: int) -> None:
    """What a drafter proposed.

    Raises:
        ValueError: it is not tokens (B, k) of the vocabulary with laws (B, k, V), 0 <= k <= lookahead.
    """
    for name, value in (("tokens", drafted), ("laws", laws)):
        if not isinstance(value, torch.Tensor) and not (value is None and name == "laws"):
            raise ValueError(f"the draft proposed {name} as {type(value).__name__}; expected a tensor")
    shape = tuple(drafted.shape)
    if len(shape) != 2 or shape[0] != rows or shape[1] > lookahead:
        raise ValueError(f"the draft proposed tokens of shape {shape}; expected ({rows}, k) with k at most {lookahead}")
    check_tokens("the draft's proposal", drafted.contiguous(), shape, vocabulary, drafted)
    if laws is not None and laws.shape != (*shape, vocabulary):
        raise ValueError(f"the draft gave laws of shape {tuple(laws.shape)}; expected {(*shape, vocabulary)}")


class NgramProposer(Proposer):
    """``NgramDrafter`` on the device: the same proposals, found by a search of the whole text.

    text: (B, L) int64, each row's committed tokens; L bounds the length of a text, and ``reserve`` makes it grow.
    """

    def __init__(self, drafter: NgramDrafter, device: torch.device) -> None:
        self._longest, self._shortest, self._device = drafter.longest, drafter.shortest, device

    def prepare(self, batch: int, lookahead: int, sampler: Sampler, replayed: bool) -> "NgramProposer":
        prepared = copy.copy(self)
        prepared._lengthen(torch.zeros(batch, 0, dtype=torch.int64, device=self._device))
        return prepared

    def _lengthen(self, text: torch.Tensor) -> None:
        self.text, self._at = text, torch.arange(text.shape[1], dtype=torch.int64, device=self._device)

    def reserve(self, entries: int) -> bool:
        missing = entries - self.text.shape[1]
        if missing <= 0:
            return False
        self._lengthen(torch.nn.functional.pad(self.text, (0, missing + entries)))
        return True

    def tensors(self) -> list[torch.Tensor]:
        return [self.text]

    def absorb(self, texts: list[list[int]]) -> None:
        for row, text in zip(self.text, texts, strict=True):
            row[: len(text)] = torch.tensor(text, dtype=torch.int64, device=row.device)

    def draft(self, places: RowPlaces, lookahead: int, verdicts: torch.Tensor) -> Proposal:
        """Rows without a match repeat their last token, of which none counts."""
        length = places.positions[:, None].clamp(min=1)  # 0 before a row's first text
        same, matched = self._at < length, torch.zeros_like(self.text)
        for back in range(1, self._longest + 1):  # how many tokens before a place equal the text's last ones
            last = self.text.gather(1, (length - back).clamp(min=0))
            same = same & (self.text.roll(back, 1) == last) & (self._at >= back)
            matched += same
        # The longest match, and of those the latest place.
        found = torch.where(matched >= self._shortest, matched * len(self._at) + self._at, -1).amax(1, keepdim=True)
        place = torch.where(found < 0, length - 1, found % len(self._at))
        step = torch.arange(lookahead, dtype=torch.int64, device=place.device)
        tokens = self.text.gather(1, place + step % (length - place))
        verdicts.zero_()
        return Proposal(tokens, None, torch.where(found[:, 0] < 0, 0, places.room))


def is_ngram(draft: object) -> bool:
    """Whether ``NgramProposer`` drafts as this does."""
    return isinstance(draft, NgramDrafter) and type(draft).propose is NgramDrafter.propose


def is_told_the_text(draft: object) -> bool:
    """Whether a draft is Python that has to know the committed tokens before it proposes any."""
    if isinstance(draft, ModelDrafter):
        return type(draft).propose is not ModelDrafter.propose
    return isinstance(draft, Drafter) and not isinstance(draft, MambaLM | Proposer)


def draft_model(draft: object) -> LanguageModel | None:
    """The model that a draft runs, if it is known to."""
    if isinstance(draft, Proposer):
        return draft.model
    return draft if isinstance(draft, LanguageModel) and not is_told_the_text(draft) else None


def as_proposer(draft: object, texts: list[list[int]], target: LanguageModel, fixed: bool) -> Proposer:
    """What drafts in rounds of these texts. fixed: see ``Executor``."""
    if fixed and is_ngram(draft):
        return NgramProposer(draft, target.device)
    if is_told_the_text(draft):
        drafter = copy.copy(draft) if type(draft) is NgramDrafter else draft
        return HostProposer(drafter, texts, target.vocab_size)
    return draft if isinstance(draft, Proposer) else ModelDrafter(draft)
