"""The loop: draft, verify, accept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..models.language_model import MambaLM
from .cache import GenerationCache, RowState, absorb
from .drafter import Drafter, LanguageModel, ModelDrafter, as_drafter
from .inputs import check_drafted, check_generation, check_models, read_prompts
from .lookahead import AUTO_AT_MOST, AdaptiveLookahead, FixedLookahead
from .ngram import NgramDrafter
from .sampling import LogitsProcessor, Sampler, SamplingParams
from .stats import GenerationStats
from .text import TextStream


@dataclass
class GenerationResult:
    """sequences: one LongTensor per row, prompt included. logits: with ``output_logits``, per row (new tokens, V)
    float32, the target's own before each new token. finish_reasons: per row "length", "eos" or "stop". cache: the one
    that was passed."""

    sequences: list[torch.Tensor]
    finish_reasons: list[str]
    stats: GenerationStats
    logits: list[torch.Tensor] | None = None
    cache: GenerationCache | None = None


@dataclass
class _Row:
    """One text in the making."""

    tokens: list[int]
    budget: int
    stream: TextStream | None
    logits: list[torch.Tensor] = field(default_factory=list)
    finish_reason: str | None = None

    def commit(self, token: int, stop_token_ids: frozenset[int]) -> None:
        self.tokens.append(token)
        self.budget -= 1
        if self.stream is not None:
            self.stream.push(token)
        if token in stop_token_ids:
            self.finish_reason = "eos"
        elif self.stream is not None and self.stream.stopped:
            self.finish_reason = "stop"
        elif self.budget == 0:
            self.finish_reason = "length"


@torch.no_grad()
def generate(
    target: MambaLM | LanguageModel,
    prompt_ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    draft: MambaLM | LanguageModel | Drafter | str | None = None,
    lookahead: int | str = 4,
    max_new_tokens: int = 64,
    sampling: SamplingParams | None = None,
    acceptance: str = "rejection",
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    on_token: Callable[[int, int], None] | None = None,
    output_logits: bool = False,
    logits_processor: LogitsProcessor | None = None,
    cache: GenerationCache | None = None,
) -> GenerationResult:
    """Continues each prompt, with a draft faster and to the same effect as without.

    Greedy text and its logits are bit for bit those of plain greedy decoding of each row alone. Sampled text follows
    the same law as plain sampling; with ``acceptance="coupled"`` it is the same text.

    Args:
        target: the model whose text is wanted.
        prompt_ids: LongTensor (B, L), or a list of B lists of token ids, which may differ in length.
        draft: a smaller model with the same vocabulary, or any ``Drafter``; ``"ngram"`` for ``NgramDrafter``, which
            needs no model and copies from the text so far; None decodes plainly.
        lookahead: K, tokens drafted per round, 1 to 15; or ``"auto"``: chosen round by round from running acceptance
            and measured costs, at most 10, and plain decoding from where the draft turns out not to pay. Greedy and
            coupled text is the same as ever; under rejection sampling the text then depends on the clock, the law
            does not.
        max_new_tokens: budget per row; exactly so many tokens unless a stop comes first. 0 gives the prompts back.
        sampling: defaults to greedy.
        acceptance: how sampled drafts are tested. ``"rejection"`` (Leviathan et al. 2023, arXiv 2211.17192): the law
            of plain sampling, and of all tests the one that keeps most. ``"coupled"`` (Gumbel coupling,
            arXiv 2408.07978): the very text of plain sampling with that seed, for any draft and lookahead. Greedy
            decoding needs no choice.
        stop_token_ids: a row ends with the first of these; None means the model's end-of-text token.
        stop_strings: a row ends with the token that completes one; needs ``target.tokenizer``. Only new text counts.
        on_token: called as ``on_token(row, token)`` for every committed token, in order.
        output_logits: also return the logits.
        logits_processor: called as ``logits_processor(row, tokens, logits)`` for one position at a time, with the text
            before it and its logits (V), which it may change or replace and must return; -inf forbids a token. Penalty
            and filters come after it. It must depend on its arguments alone: it also sees drafted tokens, though none
            that it has forbidden, and the draft's logits.
        cache: goes on from the texts it holds, with which the prompts must begin, and follows this call's; an empty
            ``GenerationCache()`` is filled. Greedy and coupled text is bit for bit that of one longer call.

    Raises:
        ValueError: an argument is out of range, the vocabularies differ, the cache belongs to something else, or a
            model's logits are NaN.
    """
    check_models(target, draft)
    if isinstance(draft, str):
        draft = NgramDrafter(target.vocab_size)
    prompts = read_prompts(prompt_ids, target.vocab_size)
    sampling = SamplingParams() if sampling is None else sampling
    if stop_token_ids is None:
        eos = target.eos_token_id
        stop_token_ids = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
    check_generation(
        target, len(prompts), lookahead=lookahead, max_new_tokens=max_new_tokens, sampling=sampling,
        acceptance=acceptance, stop_strings=stop_strings, stop_token_ids=stop_token_ids, on_token=on_token,
        logits_processor=logits_processor, cache=cache,
    )  # fmt: skip
    rows = [
        _Row(list(prompt), max_new_tokens, TextStream(target.tokenizer, stop_strings) if stop_strings else None)
        for prompt in prompts
    ]
    if cache is not None:
        cache.open([row.tokens for row in rows], target, draft)
    run = _Run(target, rows, frozenset(stop_token_ids), on_token, output_logits, cache)
    most = AUTO_AT_MOST if lookahead == "auto" else lookahead
    most = 0 if draft is None else min(most, max(max_new_tokens - 1, 0))
    run.stats.tested_per_position, run.stats.accepted_per_position = [0] * most, [0] * most
    if max_new_tokens == 0:
        for row in rows:
            row.finish_reason = "length"
        return run.result()
    sampler = Sampler(
        sampling, len(rows), target.vocab_size, acceptance=acceptance, processor=logits_processor,
        device=target.device, backend=getattr(target, "backend", "auto"),
    )  # fmt: skip
    chooser = AdaptiveLookahead(most) if most and lookahead == "auto" else FixedLookahead(most)
    run.prefill(draft, chooser, sampler)
    try:
        while active := [index for index, row in enumerate(rows) if row.finish_reason is None]:
            run.round(active, sampler)
    finally:
        run.save()
    return run.result()


class _Run:
    """One call of ``generate``: the models' caches, and where each row stands in them."""

    def __init__(
        self,
        target: LanguageModel,
        rows: list[_Row],
        stops: frozenset[int],
        on_token: Callable[[int, int], None] | None,
        output_logits: bool,
        cache: GenerationCache | None,
    ) -> None:
        self.target, self.rows, self.stops = target, rows, stops
        self.on_token, self.output_logits, self.cache = on_token, output_logits, cache
        self.stats = GenerationStats(sum(len(row.tokens) for row in rows))
        self.drafter: Drafter | None = None

    def prefill(self, draft: object, lookahead: AdaptiveLookahead | FixedLookahead, sampler: Sampler) -> None:
        started = time.perf_counter()
        self.lookahead = lookahead
        self.layers = self.target.new_cache(len(self.rows), lookahead.most + 1)
        for index, row in enumerate(self.rows):
            state = self.cache.target_states[index] if self.cache else None
            absorb(self.target, self.layers, index, row.tokens[:-1], state)
        if lookahead.most:
            self.drafter = as_drafter(draft, self.cache.draft_states if self.cache else None)
            self.drafter.begin([list(row.tokens) for row in self.rows], lookahead.most, sampler)
        # The slot from which each row's text goes on; None while the models run, when no slot is to be trusted.
        self.slots: list[int] | None = [0] * len(self.rows)
        # The draft's slot, and how long the text was when the draft was last asked.
        self.draft_at = [(0, len(row.tokens)) for row in self.rows]
        self.stats.prefill_s = time.perf_counter() - started
        self.decoding = time.perf_counter()

    def round(self, active: list[int], sampler: Sampler) -> None:
        rows, device = self.rows, self.target.device
        # The longest row sets the window; what a shorter one drafts past its budget is dropped when it commits.
        drafts = min(self.lookahead.next(), max(rows[index].budget for index in active) - 1)
        window = torch.tensor([row.tokens[-1:] for row in rows], device=device)
        drafted, laws = window[:, :0], None
        start_slot = torch.tensor(self.slots, dtype=torch.int32, device=device)
        self.slots = None
        sampler.begin_round([row.tokens for row in rows], active)
        began = time.perf_counter()
        if drafts:
            drafted, laws = self.drafter.propose([row.tokens for row in rows], self._draft_slots(start_slot), drafts)
            check_drafted(drafted, laws, len(rows), drafts, self.target.vocab_size)
            drafted = drafted.to(device)
            window = torch.cat([window, drafted], 1)
        proposed = time.perf_counter()
        logits = self.target.verify(window, self.layers, start_slot)
        verified = time.perf_counter()
        accepted, following = sampler.accept(logits, drafted, laws)
        self.stats.rounds += 1
        self.stats.draft_s += proposed - began
        self.stats.verify_s += verified - proposed
        judged = self.stats.tested, self.stats.accepted
        fresh = self._commit(drafts > 0, drafted, accepted, following, logits)
        tested, agreed = self.stats.tested - judged[0], self.stats.accepted - judged[1]
        self.lookahead.observe(drafted.shape[1], tested, agreed, proposed - began, time.perf_counter() - proposed)
        if self.on_token is not None:
            for row, token in fresh:
                self.on_token(row, token)
        self.stats.decode_s = time.perf_counter() - self.decoding

    def _draft_slots(self, start_slot: torch.Tensor) -> torch.Tensor:
        """The slots that the draft goes on from: the target's, unless it was left out of the last round."""
        behind = [
            (index, row)
            for index, row in enumerate(self.rows)
            if row.finish_reason is None and self.draft_at[index][1] < len(row.tokens)
        ]
        if not behind or not isinstance(self.drafter, ModelDrafter):
            return start_slot
        for index, row in behind:
            self.drafter.catch_up(index, row.tokens, *self.draft_at[index])
        return torch.zeros_like(start_slot)

    def _commit(
        self,
        asked: bool,
        drafted: torch.Tensor,
        accepted: torch.Tensor,
        following: torch.Tensor,
        logits: torch.Tensor,
    ) -> list[tuple[int, int]]:
        """Appends each row's accepted tokens and the next one, up to a stop or the end of its budget; returns them."""
        fresh, slots = [], [0] * len(self.rows)
        for index, (row, tokens, agreed, last) in enumerate(
            zip(self.rows, drafted.tolist(), accepted.tolist(), following.tolist(), strict=True)
        ):
            if row.finish_reason is not None:
                continue
            committed = 0
            for token in [*tokens[:agreed], last]:
                row.commit(token, self.stops)
                if self.output_logits:
                    row.logits.append(logits[index, committed].clone())
                committed += 1
                fresh.append((index, token))
                if row.finish_reason is not None:
                    break
            self.stats.count(len(tokens), agreed, committed)
            slots[index] = committed - 1
            if asked:
                self.draft_at[index] = committed - 1, len(row.tokens)
            if row.finish_reason is not None:
                self._save_row(index, committed - 1)  # rounds of the other rows will write over its slots
        self.slots = slots
        return fresh

    def save(self) -> None:
        """Leaves the rows that are still generating in the cache, unless the models were interrupted."""
        for index, row in enumerate(self.rows):
            if row.finish_reason is None and self.slots is not None:
                self._save_row(index, self.slots[index])

    def _save_row(self, index: int, slot: int) -> None:
        if self.cache is None:
            return
        absorbed = len(self.rows[index].tokens) - 1
        self.cache.target_states[index] = RowState.of(self.layers, index, slot, absorbed)
        if isinstance(self.drafter, ModelDrafter):
            self.cache.draft_states[index] = self.drafter.state(index, *self.draft_at[index])

    def result(self) -> GenerationResult:
        vocabulary = self.target.vocab_size
        logits = [torch.stack(row.logits) if row.logits else torch.empty(0, vocabulary) for row in self.rows]
        return GenerationResult(
            sequences=[torch.tensor(row.tokens) for row in self.rows],
            finish_reasons=[row.finish_reason or "length" for row in self.rows],
            stats=self.stats,
            logits=logits if self.output_logits else None,
            cache=self.cache,
        )
