"""Drafters in a round: one that has to be told the text, and prompt lookup on the device."""

import copy

import torch

from ..ops.checks import check_tokens
from ..ops.commit_tokens import RowPlaces
from .drafter import Drafter, LanguageModel, ModelDrafter, Proposal, Proposer
from .ngram import NgramDrafter
from .sampling import Sampler


class HostProposer:
    """A ``Drafter`` in a round: it is told the committed texts, which the host has to know by then."""

    def __init__(self, drafter: Drafter, texts: list[list[int]], vocabulary: int) -> None:
        self.drafter, self._texts, self._vocabulary = drafter, texts, vocabulary

    def prepare(self, batch: int, lookahead: int, sampler: Sampler, replayed: bool) -> "HostProposer":
        self._lookahead, self._sampler = lookahead, sampler
        return self

    def absorb(self, texts: list[list[int]]) -> None:
        self.drafter.begin([list(text) for text in texts], self._lookahead, self._sampler)

    def draft(self, places: RowPlaces, lookahead: int, verdicts: torch.Tensor) -> Proposal:
        proposal = self.drafter.propose(self._texts, places.slots[0].clamp(min=0), lookahead)
        if not isinstance(proposal, tuple) or len(proposal) != 2:
            raise ValueError(f"the draft's propose must return (tokens, laws), got {type(proposal).__name__}")
        tokens, laws = proposal
        check_drafted(tokens, laws, len(self._texts), lookahead, self._vocabulary)
        limits = places.room
        if isinstance(self.drafter, NgramDrafter):
            limits = torch.minimum(limits, torch.tensor(self.drafter.counts, dtype=torch.int32, device=limits.device))
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


class NgramProposer:
    """``NgramDrafter`` on the device: the same proposals, found by a search of the whole text.

    text: (B, L) int64, each row's committed tokens; ``length`` is L and bounds the length of a text.
    """

    def __init__(self, drafter: NgramDrafter, length: int, device: torch.device) -> None:
        self._longest, self._shortest = drafter.longest, drafter.shortest
        self._at = torch.arange(length, device=device)

    def prepare(self, batch: int, lookahead: int, sampler: Sampler, replayed: bool) -> "NgramProposer":
        prepared = copy.copy(self)
        prepared.text = torch.zeros(batch, len(self._at), dtype=torch.int64, device=self._at.device)
        return prepared

    def absorb(self, texts: list[list[int]]) -> None:
        for row, text in zip(self.text, texts, strict=True):
            row[: len(text)] = torch.tensor(text, device=row.device)

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
        step = torch.arange(lookahead, device=place.device)
        tokens = self.text.gather(1, place + step % (length - place))
        verdicts.zero_()
        return Proposal(tokens, None, torch.where(found[:, 0] < 0, 0, places.room))


def is_told_the_text(draft: object) -> bool:
    """Whether a draft is Python that has to know the committed tokens before it proposes any."""
    if isinstance(draft, ModelDrafter):
        return type(draft).propose is not ModelDrafter.propose
    return hasattr(draft, "propose") and not hasattr(draft, "draft")


def searches_on_device(draft: object) -> bool:
    """Whether ``NgramProposer`` drafts as this does."""
    return isinstance(draft, NgramDrafter) and type(draft).propose is NgramDrafter.propose


def as_proposer(
    draft: Drafter | LanguageModel | Proposer, texts: list[list[int]], target: LanguageModel, length: int, fixed: bool
) -> Proposer:
    """What drafts in rounds of these texts, which have room to grow to ``length`` tokens. fixed: see ``Executor``."""
    if fixed and searches_on_device(draft):
        return NgramProposer(draft, length, target.device)
    if is_told_the_text(draft):
        drafter = copy.copy(draft) if type(draft) is NgramDrafter else draft
        return HostProposer(drafter, texts, target.vocab_size)
    return draft if hasattr(draft, "draft") else ModelDrafter(draft)
