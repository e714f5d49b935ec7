"""One round of a batch, on the models' device: propose, verify, accept, commit."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..layers.cache import AttentionCache
from ..models.language_model import MambaLM
from ..ops import commit_tokens
from ..ops.commit_tokens import BatchState
from .cache import RowState, new_layers, prefill
from .drafts.base import Draft, LanguageModel, Proposal
from .sampling import Sampler, SamplingParams


@dataclass
class RoundResult:
    """lookahead, proposed: tokens a row that were asked for, and that came. record: (B, 7 + proposed) int64, see
    ``commit_tokens``. logits: (B, 1 + proposed, V) of the target. A later round may write over both. draft_s, verify_s:
    until the calls of the draft and of the target returned."""

    lookahead: int
    proposed: int
    record: torch.Tensor
    logits: torch.Tensor
    draft_s: float = 0.0
    verify_s: float = 0.0


class Round:
    """What rounds work on, and how they are run. Between two rounds nothing has to be read by the host.

    Rows are left out until they are admitted, and again when they have ended: a round then changes nothing of them.
    captured: the whole round is captured, so the models' calls are not recorded by themselves.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: Draft | None,
        sampler: Sampler,
        state: BatchState,
        captured: bool = False,
    ) -> None:
        steps, batch = state.slots.shape
        device = state.last.device
        self.target, self.sampler, self.state, self._captured = target, sampler, state, captured
        self.draft = draft and draft.allocate(batch, steps - 1, sampler, captured=captured)
        self.layers = new_layers(target, batch, steps, captured)
        self._is_stop = torch.zeros(target.vocab_size, dtype=torch.bool, device=device)
        self._row_status = torch.zeros(batch, dtype=torch.int32, device=device)
        self._steps = torch.arange(steps, dtype=torch.int32, device=device)
        self._no_proposal = Proposal(torch.empty(batch, 0, dtype=torch.int64, device=device))
        self._used: set[int] = set()  # rows that had a text

    def run(self, lookahead: int) -> RoundResult:
        """Drafts so many tokens for every row, or fewer if the draft has no more, and commits those that stand."""
        began = time.perf_counter()
        state, sampler = self.state, self.sampler
        proposal = self.draft.propose(state, lookahead) if lookahead else self._no_proposal
        proposed = time.perf_counter()
        tokens, window, num_tokens = proposal.tokens, state.last[:, 1:], None
        if tokens.shape[1]:
            window = torch.cat([window, tokens], 1)
            num_tokens = state.remaining - 1  # the last one of a budget need not be drafted
            if proposal.num_tokens is not None:
                num_tokens = torch.minimum(num_tokens, proposal.num_tokens)
        logits = self.target.verify(window, self.layers, state.slots[0])
        verified = time.perf_counter()
        accepted, next_token = sampler.accept(
            logits, tokens, proposal.probs, num_tokens, self._is_stop, self._row_status
        )
        record = commit_tokens(
            tokens, accepted, next_token, self._row_status, proposal.row_status, num_tokens, self._is_stop, state,
            output_counts=sampler.output_counts, text=self.draft and self.draft.text, backend=sampler.backend,
        )  # fmt: skip
        return RoundResult(lookahead, tokens.shape[1], record, logits, proposed - began, verified - proposed)

    def stop_at(self, token_ids: frozenset[int]) -> None:
        """From the next round on these tokens end rows."""
        self._is_stop.zero_()
        self._is_stop[torch.tensor(sorted(token_ids), dtype=torch.int64, device=self._is_stop.device)] = True

    def admit(
        self,
        row: int,
        text: list[int],
        max_new_tokens: int,
        params: SamplingParams,
        rng_key: Sequence[int],
        target_state: RowState | None,
        draft_state: RowState | None,
    ) -> None:
        """A row goes on from this text, of which the states have read some."""
        state = self.state
        if row in self._used:
            for layer in self._all_layers():
                layer.row(row).reset()
        self._used.add(row)
        prefill(self.target, self.layers, row, text[:-1], target_state)
        if self.draft is not None:
            self.draft.prefill(row, text, draft_state)
        self.sampler.admit(row, text, params, rng_key)
        state.last[row] = torch.tensor([0, *text][-2:], dtype=torch.int64, device=state.last.device)
        state.positions[row] = len(text)
        state.remaining[row] = max_new_tokens
        state.slots[:, row] = self._steps
        state.active[row] = True

    def retire(self, row: int) -> None:
        """From the next round on this row stays as it is."""
        self.state.active[row] = False
        self.state.slots[:, row] = -1

    def retire_all(self) -> None:
        self.state.active.fill_(False)
        self.state.slots.fill_(-1)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Rounds that run meanwhile change nothing."""
        state, caches = self.state, [layer for layer in self._all_layers() if isinstance(layer, AttentionCache)]
        active, slots, bounds = state.active.clone(), state.slots.clone(), [cache.at_most for cache in caches]
        self.retire_all()
        for cache in caches:
            cache.at_most = 0
        yield
        state.active.copy_(active)
        state.slots.copy_(slots)
        for cache, bound in zip(caches, bounds, strict=True):
            cache.at_most = bound

    def reserve(self, entries: int) -> bool:
        """Makes memory for texts of so many tokens. Whether anything moved."""
        moved = isinstance(self.target, MambaLM) and self.target.reserve(self.layers, entries)
        return (self.draft is not None and self.draft.reserve(entries)) or moved

    def tensors(self) -> list[torch.Tensor]:
        """Memory of caches and texts."""
        own = [tensor for layer in self.layers for tensor in layer.tensors()]
        return own + (self.draft.tensors() if self.draft else [])

    def _all_layers(self) -> list:
        return [*self.layers, *(self.draft.layers if self.draft else ())]
