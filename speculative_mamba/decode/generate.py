"""The loop: draft, verify, accept."""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from ..models.language_model import MambaLM
from .cache import GenerationCache, RowState
from .drafter import Drafter, LanguageModel, ModelDrafter
from .executors import Executor, Same
from .graphs import as_executor
from .inputs import check_generation, check_models
from .lookahead import AUTO_AT_MOST, AUTO_LOOKAHEADS, AdaptiveLookahead, FixedLookahead
from .ngram import NgramDrafter
from .prompts import read_prompts
from .proposers import HostProposer, as_proposer, draft_model, is_ngram
from .round import Round, RoundResult, broken
from .sampling import LogitsProcessor, Sampler, SamplingParams
from .stats import GenerationStats
from .text import TextStream

_AHEAD = 256  # tokens for which memory is made at a time


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
    tokenizer: Tokenizer | None = None
    slot: int | None = 0  # that the text goes on from; None where it was written over, or not all is booked
    draft_at: tuple[int, int] | None = None  # the draft's slot, and the text's length, when the draft was last asked

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

    def ends_within(self, tokens: Sequence[int], stop_token_ids: frozenset[int]) -> bool:
        """Whether the text is complete with some of these tokens."""
        if len(tokens) >= self.budget or not stop_token_ids.isdisjoint(tokens):
            return True
        if self.stream is None or not tokens:
            return False
        ahead = copy.deepcopy(self.stream, {id(self.tokenizer): self.tokenizer})
        for token in tokens:
            ahead.push(token)
        return ahead.stopped


@torch.no_grad()
def generate(
    target: MambaLM | LanguageModel,
    prompt_ids: torch.Tensor | Sequence[Sequence[int]] | Mapping,
    *,
    attention_mask: torch.Tensor | Sequence[Sequence[int]] | None = None,
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
    executor: Executor | str = "eager",
) -> GenerationResult:
    """Continues each prompt, with a draft faster and to the same effect as without.

    Greedy text and its logits are bit for bit those of plain greedy decoding of each row alone. Sampled text follows
    the same law as plain sampling; with ``acceptance="coupled"`` it is the same text.

    Args:
        target: the model whose text is wanted.
        prompt_ids: LongTensor (B, L), or a list of B lists of token ids, which may differ in length; also what a
            tokenizer returns, of tokenizers or transformers, for one text or for several.
        attention_mask: (B, L), 0 where ``prompt_ids`` hold padding, at either end of a row; tokenizers of transformers
            return one. A row's text is that of the row alone, without padding.
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
        executor: ``"graph"`` runs a whole round as one CUDA graph, captured at the first call of its kind, and queues
            two rounds ahead, so that tokens are seen up to two rounds late. The text is bit for bit that of
            ``"eager"``. It takes draft models, ``"ngram"`` and no draft, but neither other drafters nor a
            logits_processor, which are Python. A ``GraphExecutor`` of your own has its own graphs and memory.

    Raises:
        ValueError: an argument is out of range, the vocabularies differ, the cache belongs to something else, a
            model's logits are NaN, or the executor cannot run what was asked for.
    """
    check_models(target, draft)
    if isinstance(draft, str):
        draft = NgramDrafter(target.vocab_size)
    goes_on = isinstance(cache, GenerationCache) and bool(cache.sequences)
    prompts = read_prompts(prompt_ids, attention_mask, target, may_be_padded=not goes_on)
    sampling = SamplingParams() if sampling is None else sampling
    if stop_token_ids is None:
        eos = target.eos_token_id
        stop_token_ids = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
    check_generation(
        target, len(prompts), lookahead=lookahead, max_new_tokens=max_new_tokens, sampling=sampling,
        acceptance=acceptance, stop_strings=stop_strings, stop_token_ids=stop_token_ids, on_token=on_token,
        logits_processor=logits_processor, cache=cache,
    )  # fmt: skip
    max_new_tokens, lookahead = int(max_new_tokens), lookahead if lookahead == "auto" else int(lookahead)
    tokenizer = target.tokenizer if stop_strings else None
    rows = [
        _Row(
            list(prompt), max_new_tokens, TextStream(tokenizer, stop_strings, prompt) if stop_strings else None,
            tokenizer=tokenizer,
        )
        for prompt in prompts
    ]  # fmt: skip
    executor = as_executor(executor, target, draft, logits_processor)
    if cache is not None:
        cache.open(prompts, target, draft_model(draft))
    most = AUTO_AT_MOST if lookahead == "auto" else lookahead
    most = 0 if draft is None else min(most, max(max_new_tokens - 1, 0))
    run = _Run(target, rows, frozenset(stop_token_ids), most, executor, on_token, output_logits, cache)
    if max_new_tokens == 0:
        for row in rows:
            row.finish_reason = "length"
        return run.result()
    lookaheads = tuple(k for k in AUTO_LOOKAHEADS if k <= most) if most and lookahead == "auto" else (most,)
    chooser = AdaptiveLookahead(lookaheads) if len(lookaheads) > 1 else FixedLookahead(most)
    with executor:
        try:
            run.open(draft, chooser, sampling, acceptance, logits_processor)
            run.prefill()
            while run.generating():
                run.launch()
                while executor.waiting > executor.lag:
                    run.collect()
        finally:
            run.close()
    return run.result()


class _Run:
    """One call of ``generate``: the rows' texts, and the rounds that lengthen them."""

    def __init__(
        self,
        target: LanguageModel,
        rows: list[_Row],
        stops: frozenset[int],
        most: int,
        executor: Executor,
        on_token: Callable[[int, int], None] | None,
        output_logits: bool,
        cache: GenerationCache | None,
    ) -> None:
        self.target, self.rows, self.stops, self.most = target, rows, stops, most
        self.executor, self.on_token, self.output_logits, self.cache = executor, on_token, output_logits, cache
        self.texts = [row.tokens for row in rows]
        self.stats = GenerationStats(sum(map(len, self.texts)))
        self.stats.tested_per_position, self.stats.accepted_per_position = [0] * most, [0] * most
        self.round: Round | None = None
        self.draft: ModelDrafter | None = None
        self.in_flight = True  # a model may be running: states of rows that have not ended are not to be trusted
        self.skipped = False  # the draft was left out of the last round

    def open(
        self,
        draft: object,
        lookahead: AdaptiveLookahead | FixedLookahead,
        sampling: SamplingParams,
        acceptance: str,
        processor: LogitsProcessor | None,
    ) -> None:
        """Gets a round from the executor, with memory for these texts."""
        started = time.perf_counter()
        self.lookahead, batch, fixed = lookahead, len(self.rows), self.executor.fixed
        entries = self._entries(_AHEAD)

        def make() -> Round:
            sampler = Sampler(
                sampling, batch, self.target.vocab_size, acceptance=acceptance, processor=processor,
                device=self.target.device, backend=getattr(self.target, "backend", "auto"),
            )  # fmt: skip
            proposer = as_proposer(draft, self.texts, self.target, fixed) if self.most else None
            if proposer is not None:
                proposer = proposer.prepare(batch, self.most, sampler, fixed)
            return Round(self.target, proposer, sampler, batch, self.most, fixed)

        draft = draft if self.most else None
        kind = Same(draft), Same(draft_model(draft))
        if is_ngram(draft):
            kind = draft.longest, draft.shortest
        options = dataclasses.replace(sampling, seed=0), acceptance
        key = (Same(self.target), *kind, batch, lookahead.all, *options)
        self.round = self.executor.open(key, make, entries, lookahead.all, self.output_logits)
        self.round.sampler.reseed(sampling)
        drafter = self.round.proposer
        drafter = drafter.drafter if isinstance(drafter, HostProposer) else drafter
        self.draft = drafter if isinstance(drafter, ModelDrafter) else None
        self.stats.setup_s = time.perf_counter() - started

    def prefill(self) -> None:
        started = time.perf_counter()
        cache, proposer = self.cache, self.round.proposer
        self.round.absorb(self.texts, cache.target_states if cache else None)
        if proposer is self.draft and proposer is not None:
            self.draft.states = cache.draft_states if cache else None
        if proposer is not None:
            proposer.absorb(self.texts)
        if proposer is self.draft and proposer is not None:
            self.draft.states = None  # they are the cache's
        self.round.begin(self.texts, self.rows[0].budget, self.stops)
        for row in self.rows:
            row.draft_at = 0, len(row.tokens)
        self.in_flight = False
        self.stats.prefill_s = time.perf_counter() - started
        self.decoding = time.perf_counter()

    def generating(self) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.finish_reason is None]

    def launch(self) -> None:
        """Queues the next round, unless the last tokens have come meanwhile."""
        drafts = self.lookahead.next()
        if self.lookahead.dropped and self.stats.draft_dropped_at is None:
            self.stats.draft_dropped_at = self.stats.rounds
        if self.draft is not None and drafts and self.skipped:
            self._catch_up()
        self._make_room()
        active = self.generating()
        if not active:
            return
        if not self.executor.fixed:  # what goes beyond every row's budget need not be drafted
            drafts = min(drafts, max(self.rows[index].budget for index in active) - 1)
        self.skipped = not drafts
        self.in_flight = True
        self.round.sampler.follow({index: self.texts[index] for index in active}, self._ends_within)
        self.executor.launch(drafts)

    def _make_room(self) -> None:
        """Memory for the tokens of the rounds that are queued and of the next one."""
        if not self.executor.fits(self._entries(self.executor.waiting * (self.most + 1))):
            self._drain()
            self.executor.grow(self._entries(_AHEAD))

    def _entries(self, tokens: int) -> int:
        """What the longest text takes when each row has so many more, within its budget, and a window is verified."""
        return max(len(row.tokens) + min(row.budget, tokens) for row in self.rows) + self.most + 1

    def _drain(self) -> None:
        while self.executor.waiting:
            self.collect()

    def _ends_within(self, index: int, tokens: list[int]) -> bool:
        return self.rows[index].ends_within(tokens, self.stops)

    def _catch_up(self) -> None:
        """The draft reads what came in rounds without it."""
        self._drain()
        for index in self.generating():
            row = self.rows[index]
            at, row.draft_at = row.draft_at, None
            self.draft.catch_up(index, row.tokens, *at)
            row.draft_at = 0, len(row.tokens)

    def collect(self) -> None:
        """Waits for the oldest round, and appends to each row what it gained, up to a stop."""
        result, record, seconds = self.executor.collect()
        for index, (_, accepted, verdict, _, *tokens) in enumerate(record):
            if verdict and self.rows[index].finish_reason is None:
                if not self._ends_within(index, tokens[:accepted]):
                    raise ValueError(broken(index, accepted, verdict))
                record[index][0] = accepted  # a stop string, of which the device does not know
        tested, agreed, fresh = self.stats.tested, self.stats.accepted, []
        unmatched = 0  # rows beside whose tokens none counts: as good as a refused one
        for index in self.generating():
            unmatched += result.proposed > 0 and record[index][3] == 0
            fresh += [(index, token) for token in self._commit(index, record[index], result)]
        self.in_flight = self.executor.waiting > 0
        self.stats.rounds += bool(fresh)
        self.stats.draft_s += result.draft_s
        self.stats.verify_s += result.verify_s
        tested, agreed = self.stats.tested - tested, self.stats.accepted - agreed
        self.lookahead.observe(result.proposed, tested + unmatched, agreed, seconds)
        self.stats.decode_s = time.perf_counter() - self.decoding
        if self.on_token is not None:
            for row, token in fresh:
                self.on_token(row, token)

    def _commit(self, index: int, record: list[int], result: RoundResult) -> list[int]:
        row, (count, accepted, _, drafted, *tokens) = self.rows[index], record
        assert count > 0, f"row {index} has ended on the device alone"
        row.slot, committed = None, 0
        for token in tokens[:count]:
            row.commit(token, self.stops)
            if self.output_logits:
                row.logits.append(result.logits[index, committed].clone())
            committed += 1
            if row.finish_reason is not None:
                break
        self.stats.count(drafted, accepted, committed)
        if result.drafts:
            row.draft_at = committed - 1, len(row.tokens)
        if row.finish_reason == "stop":  # which the device does not know of
            self.round.leave_out(index)
        if row.finish_reason != "stop" or not self.executor.waiting:
            row.slot = committed - 1
        return tokens[:committed]

    def close(self) -> None:
        """Saves what is known, whatever happened, and gives the executor back if this call has it."""
        if self.round is None:
            return
        try:
            self.save()
        finally:
            self.executor.close()
            self.round.sampler.forget()

    def save(self) -> None:
        """Leaves in the cache the texts, and the states of all rows that are known to be those of their texts."""
        if self.cache is None:
            return
        targets, drafts = list(self.cache.target_states), list(self.cache.draft_states)
        for index, row in enumerate(self.rows):
            if row.slot is None or (self.in_flight and row.finish_reason is None):
                continue
            targets[index] = RowState.of(self.round.layers, index, row.slot, row.tokens[:-1])
            if self.draft is self.round.proposer is not None and row.draft_at is not None:
                slot, length = row.draft_at
                drafts[index] = self.draft.state(index, row.tokens[:length], slot)
        self.cache.store([list(text) for text in self.texts], targets, drafts)

    def result(self) -> GenerationResult:
        vocabulary = self.target.vocab_size
        nothing = torch.empty(0, vocabulary, dtype=torch.float32, device=self.target.device)
        logits = [torch.stack(row.logits) if row.logits else nothing for row in self.rows]
        return GenerationResult(
            sequences=[torch.tensor(row.tokens, dtype=torch.int64, device="cpu") for row in self.rows],
            finish_reasons=[row.finish_reason for row in self.rows],
            stats=self.stats,
            logits=logits if self.output_logits else None,
            cache=self.cache,
        )
