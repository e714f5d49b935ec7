"""A call of ``generate``: its arguments checked, its rows admitted, its result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..models.identity import cost_key
from ..models.prompts import encode_texts, read_prompts
from ..models.runner import LanguageModel
from ..models.text import TextStream
from ..models.tokenizer import text_tokenizer
from ..ops.sampling_params import of_rows
from .batch import Batch, CommittedToken, RowTokens
from .cache import GenerationCache
from .drafts import Draft, NgramDrafter, as_draft
from .executors import Executor, as_executor
from .inputs import check_generation, check_models, end_of_text
from .logprobs import TokenLogprobs, token_logprobs
from .lookahead import as_lookahead
from .loop import DecodeLoop
from .sampling import LogitsProcessor, SamplingParams
from .stats import GenerationStats

_PREFILL_TOKENS = 512  # of a prompt, between two calls of on_prefill


@dataclass
class GenerationResult:
    """sequences: one LongTensor per row, prompt included. logits: with ``output_logits``, per row (new tokens, V)
    float32, the target's own before each new token. logprobs: as they were asked for, per row one for each new token.
    finish_reasons: per row "length", "eos" or "stop". texts: new text per row, without what stopped it, where a prompt
    was given as text or there are stop strings. cache: the one that was passed."""

    sequences: list[torch.Tensor]
    finish_reasons: list[str]
    stats: GenerationStats
    logits: list[torch.Tensor] | None = None
    cache: GenerationCache | None = None
    texts: list[str] | None = None
    logprobs: list[list[TokenLogprobs]] | None = None


@dataclass
class Call:
    """``open`` it, take steps of its loop while rows are generating, and ``close`` it in any case."""

    target: LanguageModel
    draft: Draft | None
    prompts: list[list[int]]
    batch: Batch
    executor: Executor
    sampling: SamplingParams | list[SamplingParams]
    lookahead: int | str
    max_new_tokens: int
    coupled: bool
    stop_token_ids: list[int]
    streams: list[TextStream] | None
    output_logits: bool
    logprobs: int | None
    logits_processor: LogitsProcessor | None
    cache: GenerationCache | None
    on_commit: Callable[[list[CommittedToken]], None] | None
    on_prefill: Callable[[int], None] | None = None
    loop: DecodeLoop | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    token_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)

    @staticmethod
    def of(
        target: LanguageModel,
        prompts: object,
        attention_mask: object,
        draft: object,
        *,
        sampling: object,
        lookahead: object,
        max_new_tokens: object,
        acceptance: object,
        stop_token_ids: object,
        stop_strings: object,
        output_logits: bool,
        logprobs: object,
        logits_processor: object,
        cache: object,
        executor: object,
        on_token: object = None,
        on_commit: object = None,
        on_prefill: object = None,
        with_text: bool = False,
    ) -> "Call":
        """Of arguments of ``generate``. with_text: the rows' text is wanted in any case.

        Raises:
            ValueError: see ``generate``.
        """
        check_models(target, draft)
        if isinstance(draft, str):
            draft = NgramDrafter(target.vocab_size)
        known = cache.sequences if isinstance(cache, GenerationCache) else []
        prompts, are_text = encode_texts(prompts, known, target)
        rows = read_prompts(prompts, attention_mask, target, may_be_padded=not (known or are_text))
        sampling = SamplingParams() if sampling is None else sampling
        stop_token_ids = end_of_text(target) if stop_token_ids is None else stop_token_ids
        check_generation(
            target, len(rows), lookahead=lookahead, max_new_tokens=max_new_tokens, sampling=sampling,
            acceptance=acceptance, stop_strings=stop_strings, stop_token_ids=stop_token_ids, on_token=on_token,
            on_commit=on_commit, on_prefill=on_prefill, logits_processor=logits_processor, logprobs=logprobs,
            cache=cache,
        )  # fmt: skip
        streams = None
        if stop_strings or are_text or with_text:
            tokenizer = text_tokenizer(target)
            streams = [TextStream(tokenizer, stop_strings, prompt) for prompt in rows]
        batch, executor = Batch(len(rows)), as_executor(executor)
        draft = None if draft is None else as_draft(draft, target, batch.texts, executor.captures)
        drafting = None if draft is None else draft.model
        executor.check([target] if drafting is None else [target, drafting], logits_processor)
        if cache is not None:
            known_by = draft if drafting is None else drafting
            cache.open(rows, target, known_by if draft is not None and draft.stateful else None)
        return Call(
            target, draft, rows, batch, executor, sampling, lookahead, int(max_new_tokens), acceptance == "coupled",
            stop_token_ids, streams, output_logits, logprobs, logits_processor, cache, _in_turn(on_token, on_commit),
            on_prefill, token_logprobs=[[] for _ in rows],
        )  # fmt: skip

    def open(self) -> DecodeLoop:
        """Within the executor."""
        draft = self.draft
        pair = None if draft is None or self.lookahead != "auto" else cost_key(self.target, draft.model)
        costs = pair and (pair, len(self.prompts), self.executor.captures)
        chooser = as_lookahead(self.lookahead, 0 if draft is None else self.max_new_tokens - 1, costs)
        params = of_rows(self.sampling, len(self.prompts))
        self.loop = DecodeLoop(
            self.target, draft if max(chooser.all) else None, self.batch, self.executor, chooser,
            [its for its, _ in params], coupled=self.coupled, processor=self.logits_processor, on_commit=self._tell,
            on_prefill=self.on_prefill, prompt_length=max(map(len, self.prompts)), max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        self.stats, cache = self.loop.stats, self.cache
        for row, (prompt, (its, rng_key)) in enumerate(zip(self.prompts, params, strict=True)):
            states = (cache.target_states[row], cache.draft_states[row]) if cache is not None else (None, None)
            self.loop.admit(
                row, prompt, its, self.max_new_tokens, rng_key=rng_key, states=states,
                stop_token_ids=self.stop_token_ids, stream=self.streams and self.streams[row],
                output_logits=self.output_logits or self.logprobs is not None,
                chunk=None if self.on_prefill is None else _PREFILL_TOKENS,
            )  # fmt: skip
        while self.batch.reading:
            self.loop.read(_PREFILL_TOKENS)
        for row in range(len(self.prompts)):
            if cache is not None and cache.keep:
                cache.remember(row, *self.batch.snapshot(row))
        return self.loop

    def _tell(self, committed: list[RowTokens]) -> None:
        if self.logprobs is not None:
            for index, tokens, _ in committed:
                row = self.batch.rows[index]
                self.token_logprobs[index] += token_logprobs(row.logits[-1], tokens, self.logprobs)
                if not self.output_logits:
                    row.logits = []
        if self.on_commit is not None:
            each = [
                CommittedToken(row, token, at < drafted)
                for row, tokens, drafted in committed
                for at, token in enumerate(tokens)
            ]
            self.on_commit(each)

    @torch.no_grad()
    def steps(self) -> Iterator[None]:
        """Runs the call, a step of its loop at a time; closing the iterator ends it."""
        if self.max_new_tokens:
            with self.executor:
                try:
                    loop = self.open()
                    while self.batch.generating():
                        loop.step()
                        yield
                    self.executor.keep()
                finally:
                    self.close()

    def close(self) -> None:
        """No more rounds. Texts and states are in the cache, if there is one."""
        loop, self.loop = self.loop, None  # it calls back: what it holds is freed now, not when cycles are looked for
        if loop is not None:
            loop.close(self.cache, self.prompts)
        self.executor.close()

    def result(self) -> GenerationResult:
        """When no row is generating any more; also of a call for no token, which is never opened."""
        rows, texts = self.batch.rows, self.batch.texts()
        reasons = [row.finish_reason for row in rows if row is not None]
        logits = [row.logits for row in rows if row is not None]
        if not self.max_new_tokens:
            texts, reasons, logits = self.prompts, ["length"] * len(rows), [[] for _ in rows]
            self.stats.prompt_tokens = sum(map(len, self.prompts))
        none = torch.empty(0, self.target.vocab_size, dtype=torch.float32, device=self.target.device)
        return GenerationResult(
            sequences=[torch.tensor(text, dtype=torch.int64, device="cpu") for text in texts],
            finish_reasons=reasons,
            stats=self.stats,
            logits=[torch.cat(row) if row else none for row in logits] if self.output_logits else None,
            cache=self.cache,
            texts=None if self.streams is None else ["".join(row.pieces) if row else "" for row in rows],
            logprobs=None if self.logprobs is None else self.token_logprobs,
        )


def _in_turn(
    on_token: Callable[[int, int], None] | None, on_commit: Callable[[list[CommittedToken]], None] | None
) -> Callable[[list[CommittedToken]], None] | None:
    """One callback of two."""
    if on_token is None:
        return on_commit

    def tell(committed: list[CommittedToken]) -> None:
        if on_commit is not None:
            on_commit(committed)
        for row, token, _ in committed:
            on_token(row, token)

    return tell
