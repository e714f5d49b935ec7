"""One round of a batch, on the models' device: propose, verify, accept, commit."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..layers.cache import AttentionCache
from ..models.language_model import MambaLM
from ..models.runner import LanguageModel, ModelRunner
from ..ops import commit_tokens
from ..ops.commit_tokens import BatchState
from ..ops.recording import torch_op
from .drafts import Draft, Proposal
from .recorded import RecordedParts
from .sampling import Sampler


@dataclass(slots=True)
class RoundResult:
    """lookahead, proposed: tokens a row that were asked for, and that came. record: (B, 7 + proposed) int64, see
    ``commit_tokens``. logits: (B, 1 + proposed, V) of the target. A later round may write over both. draft_s, verify_s:
    until the calls of the draft, and of all the rest, returned."""

    lookahead: int
    proposed: int
    record: torch.Tensor
    logits: torch.Tensor
    draft_s: float = 0.0
    verify_s: float = 0.0


class Round:
    """What rounds work on, and how they are run. Between two rounds nothing has to be read by the host.

    ``state`` says which rows take part; a round changes nothing of the others. captured: the whole round is captured.
    Else its parts are recorded where compiled kernels do all of the work.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: Draft | None,
        sampler: Sampler,
        state: BatchState,
        captured: bool = False,
    ) -> None:
        (steps, batch), device = state.slots.shape, state.last.device
        self.sampler, self.state = sampler, state
        self._parts = None if captured else _recorded_parts(target, draft, sampler, state)
        recorded = self._parts is not None
        drafts_recorded = recorded and draft is not None and draft.recordable
        self.draft = draft and draft.allocate(batch, steps - 1, sampler, captured=captured or drafts_recorded)
        self.target = ModelRunner(target, batch, steps, captured=captured or recorded)
        self._is_stop = torch.zeros(batch, target.vocab_size, dtype=torch.bool, device=device)
        self._max_drafted = torch.zeros(batch, dtype=torch.int32, device=device)
        self._row_status = torch.zeros(batch, dtype=torch.int32, device=device)
        self._no_proposal = Proposal(torch.empty(batch, 0, dtype=torch.int64, device=device))
        self._recorded: set[int] = set()  # lookaheads
        self._proposals: dict[tuple, Proposal] = {}

    @property
    def recorded(self) -> bool:
        """Whether all of its parts are recorded. Then it depends on nothing of one call."""
        return self._parts is not None and (self.draft is None or self.draft.recordable)

    def run(self, lookahead: int) -> RoundResult:
        """Drafts so many tokens for every row, or fewer if the draft has no more, and commits those that stand."""
        began = time.perf_counter()
        proposal = self._propose(lookahead) if lookahead else self._no_proposal
        proposed = time.perf_counter()
        if self._parts is None:
            result = self._verify(lookahead, proposal)
        else:
            tokens, text = proposal.tokens.shape[1], self.draft and self.draft.text
            self._recorded.add(lookahead)
            self._parts.work_on("target", self.target.before_step(1 + tokens))
            self._parts.work_on("text", None if text is None else (text.data_ptr(), text.shape))
            result = self._parts.run((lookahead, *_kind(proposal)), self._verify, lookahead, proposal)
        result.draft_s, result.verify_s = proposed - began, time.perf_counter() - proposed
        return result

    def _propose(self, lookahead: int) -> Proposal:
        """With parts that are recorded in memory that stays."""
        draft, state = self.draft, self.state
        if self._parts is None:
            return draft.propose(state, lookahead)
        if draft.recordable:
            self._parts.work_on("draft", draft.before_propose(lookahead))
            return self._parts.run((lookahead,), draft.propose, state, lookahead)
        # What the draft gave may be kept, changed or given again by it, and have elements that share memory.
        proposal = draft.propose(state, lookahead)
        given = vars(proposal)
        if (kept := self._proposals.get(_kind(proposal))) is None:
            own = {name: value.new_empty(value.shape) for name, value in given.items() if value is not None}
            kept = self._proposals[_kind(proposal)] = Proposal(**own)
        for name, memory in vars(kept).items():
            if memory is not None:
                memory.copy_(given[name])
        return kept

    def _verify(self, lookahead: int, proposal: Proposal) -> RoundResult:
        state, sampler, target = self.state, self.sampler, self.target
        tokens, window, num_tokens = proposal.tokens, state.last[:, 1:], None
        if tokens.shape[1]:
            window = tokens.new_empty(tokens.shape[0], 1 + tokens.shape[1])
            torch_op(torch.cat, (state.last[:, 1:], tokens), 1, out=window)
            # The last one of a budget need not be drafted.
            num_tokens = torch.empty_like(state.remaining)
            torch_op(torch.sub, state.remaining, 1, out=num_tokens)
            torch_op(torch.minimum, num_tokens, self._max_drafted, out=num_tokens)
            if proposal.num_tokens is not None:
                torch_op(torch.minimum, num_tokens, proposal.num_tokens, out=num_tokens)
        logits = target.model.verify(window, target.layers, state.slots[0])
        accepted, next_token = sampler.accept(
            logits, tokens, proposal.probs, num_tokens, self._is_stop, self._row_status
        )
        record = commit_tokens(
            tokens, accepted, next_token, self._row_status, proposal.row_status, num_tokens, self._is_stop, state,
            output_counts=sampler.output_counts, text=self.draft and self.draft.text, backend=sampler.backend,
        )  # fmt: skip
        return RoundResult(lookahead, tokens.shape[1], record, logits)

    def trimmed(self, lookahead: int, needed: int) -> int:
        """A lookahead where no more than ``needed`` tokens can become text. A model drafts more sooner than rounds of
        another lookahead are recorded."""
        recorded = lookahead in self._recorded and self.draft is not None and self.draft.recordable
        return lookahead if recorded else min(lookahead, needed)

    def admit(
        self, row: int, text: Sequence[int], remaining: int, stop_token_ids: Collection[int], use_draft: bool
    ) -> None:
        """From the next round on a row goes on from this text, as ``BatchState.admit`` has it."""
        stops = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=self._is_stop.device)
        self._is_stop[row] = False
        self._is_stop[row, stops] = True
        self._max_drafted[row] = len(self.state.slots) - 1 if use_draft else 0
        self.state.admit(row, text, remaining)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Rounds that run meanwhile change nothing."""
        state = self.state
        active, slots = state.active.clone(), state.slots.clone()
        layers = [*self.target.layers, *(self.draft.layers if self.draft else ())]
        caches = [layer for layer in layers if isinstance(layer, AttentionCache)]
        bounds = [cache.at_most for cache in caches]
        state.leave_out()
        for cache in caches:
            cache.at_most = 0
        yield
        state.active.copy_(active)
        state.slots.copy_(slots)
        for cache, bound in zip(caches, bounds, strict=True):
            cache.at_most = bound

    def reserve(self, entries: int) -> bool:
        """Makes memory for texts of so many tokens. Whether anything moved."""
        moved = self.target.reserve(entries)
        return (self.draft is not None and self.draft.reserve(entries)) or moved

    @property
    def models(self) -> list[LanguageModel]:
        """The target, and the draft's if it has one."""
        drafting = self.draft and self.draft.model
        return [self.target.model] if drafting is None else [self.target.model, drafting]

    def tensors(self) -> list[torch.Tensor]:
        """Memory of caches and texts."""
        own = [tensor for layer in self.target.layers for tensor in layer.tensors()]
        return own + (self.draft.tensors() if self.draft else [])


def _recorded_parts(
    target: LanguageModel, draft: Draft | None, sampler: Sampler, state: BatchState
) -> RecordedParts | None:
    """None where rounds cannot be recorded: a foreign model or other backends, or logits that Python changes."""
    if not (isinstance(target, MambaLM) and target.recordable) or sampler.processor is not None:
        return None
    kinds = [model.step_kind for model in (target, draft and draft.model) if isinstance(model, MambaLM)]
    return RecordedParts(state.last, (*kinds, *state.slots.shape, sampler.kind))


def _kind(proposal: Proposal) -> tuple:
    """What it has, and how many tokens."""
    return proposal.tokens.shape[1], *[value is None for value in vars(proposal).values()]
