"""One round of a batch, on the models' device: draft, verify, accept, commit."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..ops import commit_tokens
from ..ops.commit_tokens import RowPlaces
from ..ops.sampling import ROW_STATUS_TEXTS
from .cache import RowState, absorb
from .drafter import LanguageModel, Proposal, Proposer
from .sampling import Sampler

_OF_DRAFT = 16  # verdicts of a draft's logits are this many times those of the target's


@dataclass
class RoundResult:
    """drafts, proposed: tokens a row that were asked for, and that came. record: (B, 5 + proposed) int64, see
    ``commit_tokens``. logits: (B, 1 + proposed, V) of the target. A later round may write over both. draft_s, verify_s:
    until the calls of the draft and of the target returned."""

    drafts: int
    proposed: int
    record: torch.Tensor
    logits: torch.Tensor
    draft_s: float = 0.0
    verify_s: float = 0.0


class Round:
    """What rounds work on, and how they are run. Between two rounds nothing has to be read by the host.

    Rows are left out until ``begin``, and again when they have ended: a round then changes nothing of them. With
    ``replayed`` the models' calls are not recorded, since the whole round is.
    """

    def __init__(
        self,
        target: LanguageModel,
        proposer: Proposer | None,
        sampler: Sampler,
        batch: int,
        lookahead: int,
        replayed: bool = False,
    ) -> None:
        device = target.device
        self.target, self.proposer, self.sampler = target, proposer, sampler
        self.layers = target.new_cache(batch, lookahead + 1)
        if replayed:
            self.layers = list(self.layers)
        self.places = RowPlaces(
            last=torch.zeros(batch, 2, dtype=torch.int64, device=device),
            positions=sampler.positions,
            room=torch.zeros(batch, dtype=torch.int32, device=device),
            active=sampler.active,
            slots=torch.full((lookahead + 1, batch), -1, dtype=torch.int32, device=device),
        )
        self.is_stop = torch.zeros(target.vocab_size, dtype=torch.bool, device=device)
        self._nothing = Proposal(torch.empty(batch, 0, dtype=torch.int64, device=device), None, self.places.room)
        self._verdicts = torch.zeros(lookahead + 1, batch, dtype=torch.int32, device=device)
        self._steps = torch.arange(lookahead, dtype=torch.int32, device=device)[:, None]

    def absorb(self, texts: list[list[int]], states: Sequence[RowState | None] | None) -> None:
        """The target reads each row's text but for its last token, from the fresh state on or a saved one."""
        for row, text in enumerate(texts):
            absorb(self.target, self.layers, row, text[:-1], states[row] if states else None)

    def begin(self, texts: Sequence[Sequence[int]], budget: int, stop_token_ids: Collection[int]) -> None:
        """Every row goes on from its text, which the models have read."""
        places, device = self.places, self.places.last.device
        self.sampler.begin(texts)
        places.last.copy_(torch.tensor([[text[-2] if len(text) > 1 else 0, text[-1]] for text in texts], device=device))
        places.room.fill_(budget - 1)
        slots = torch.arange(len(places.slots), dtype=torch.int32, device=device)
        places.slots.copy_(slots[:, None].expand_as(places.slots))
        self.is_stop.zero_()
        known = [token for token in stop_token_ids if 0 <= token < self.target.vocab_size]
        if known:
            self.is_stop[torch.tensor(known, device=device)] = True

    def leave_out(self, row: int) -> None:
        """From the next round on this row stays as it is."""
        self.places.active[row].fill_(False)
        self.places.slots[:, row].fill_(-1)

    def leave_all_out(self) -> None:
        """All rows, whatever an earlier call left behind: until ``begin`` rounds change nothing."""
        self.places.active.fill_(False)
        self.places.slots.fill_(-1)
        for layer in self.all_layers():
            layer.reset()

    def all_layers(self) -> list:
        """Of both models."""
        return [*self.layers, *getattr(self.proposer, "layers", [])]

    def reserve(self, entries: int) -> bool:
        """Makes room for texts of so many tokens. Whether anything moved, so that what was captured is void."""
        moved = hasattr(self.target, "reserve") and self.target.reserve(self.layers, entries)
        return (hasattr(self.proposer, "reserve") and self.proposer.reserve(entries)) or moved

    def run(self, drafts: int) -> RoundResult:
        """Drafts so many tokens for every row, or fewer if the proposer has no more."""
        began = time.perf_counter()
        places, verdicts, proposal = self.places, self._verdicts, self._nothing
        if drafts:
            proposal = self.proposer.draft(places, drafts, verdicts[:drafts])
        proposed = time.perf_counter()
        window = torch.cat([places.last[:, 1:], proposal.tokens], 1) if drafts else places.last[:, 1:]
        logits = self.target.verify(window, self.layers, places.slots[0])
        verified = time.perf_counter()
        accepted, following = self.sampler.accept(
            logits, proposal.tokens, proposal.laws, limits=proposal.limits, verdicts=verdicts[drafts]
        )
        if drafts:
            verdicts[:drafts].masked_fill_(self._steps[:drafts] >= proposal.limits, 0)  # of tokens that do not count
            verdicts[drafts].add_(verdicts[:drafts].amax(0), alpha=_OF_DRAFT)
        record = commit_tokens(
            proposal.tokens, accepted, following, verdicts[drafts], proposal.limits, self.is_stop, places,
            output_counts=self.sampler.output_counts, text=getattr(self.proposer, "text", None),
            backend=self.sampler.backend,
        )  # fmt: skip
        return RoundResult(drafts, proposal.tokens.shape[1], record, logits, proposed - began, verified - proposed)


def broken(row: int, position: int, verdict: int) -> str:
    """What a record's verdict says, in a line."""
    if verdict >= _OF_DRAFT:
        return f"the draft cannot propose a token: row {row}: {ROW_STATUS_TEXTS[verdict // _OF_DRAFT]}"
    return f"row {row}, position {position} of the window: {ROW_STATUS_TEXTS[verdict]}"
