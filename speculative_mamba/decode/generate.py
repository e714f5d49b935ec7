"""The loop: propose, verify, accept, commit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models.identity import cost_key
from ..models.prompts import read_prompts
from ..models.runner import LanguageModel
from ..models.text import TextStream
from ..models.tokenizer import tokenizer_of
from ..ops.sampling_params import of_rows
from .batch import Batch, CommittedToken
from .cache import GenerationCache
from .drafts import Draft, Drafter, NgramDrafter, as_draft
from .executors import Executor, as_executor
from .inputs import check_generation, check_models, end_of_text
from .lookahead import as_lookahead
from .loop import DecodeLoop
from .sampling import LogitsProcessor, SamplingParams
from .stats import GenerationStats

_PREFILL_TOKENS = 512  # of a prompt, between two calls of on_prefill


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


@torch.no_grad()
def generate(
    target: LanguageModel,
    prompt_ids: torch.Tensor | Sequence[Sequence[int]] | Mapping,
    *,
    attention_mask: torch.Tensor | Sequence[Sequence[int]] | None = None,
    draft: LanguageModel | Drafter | Draft | str | None = None,
    lookahead: int | str = 4,
    max_new_tokens: int = 64,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    acceptance: str = "rejection",
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    on_token: Callable[[int, int], None] | None = None,
    on_commit: Callable[[list[CommittedToken]], None] | None = None,
    on_prefill: Callable[[int], None] | None = None,
    output_logits: bool = False,
    logits_processor: LogitsProcessor | None = None,
    cache: GenerationCache | None = None,
    executor: Executor | str = "eager",
) -> GenerationResult:
    """Continues each prompt, with a draft faster and to the same effect as without.

    Greedy text and its logits are bit for bit those of plain greedy decoding of each row alone. Sampled text has the
    distribution of plain sampling; with ``acceptance="coupled"`` it is the same text.

    Args:
        target: the model whose text is wanted.
        prompt_ids: LongTensor (B, L), or a list of B lists of token ids, which may differ in length; also what a
            tokenizer returns, of tokenizers or transformers, for one text or for several.
        attention_mask: (B, L), 0 where ``prompt_ids`` hold padding, at either end of a row; tokenizers of transformers
            return one. A row's text is that of the row alone, without padding.
        draft: a smaller model with the same vocabulary, or any ``Drafter`` or ``Draft``; ``"ngram"`` for
            ``NgramDrafter``, which needs no model and copies from the text so far; None decodes plainly.
        lookahead: K, tokens drafted per round, 1 to 15; or ``"auto"``: chosen round by round from running acceptance
            and measured costs, at most 10, and plain decoding from where the draft turns out not to pay; costs of a
            pair of models are remembered, so that only the first call has rounds for measuring alone. Greedy and
            coupled text is the same as ever; under rejection sampling the text then depends on the clock, its
            distribution does not.
        max_new_tokens: budget per row; exactly so many tokens unless a stop comes first. 0 gives the prompts back.
        sampling: defaults to greedy. A list has one for each row, greedy and sampled ones alike; a row is then what it
            would be alone with its parameters. What is passed as prompt counts as prompt for its penalties.
        acceptance: how sampled drafts are tested. ``"rejection"`` (Leviathan et al. 2023, arXiv 2211.17192) keeps the
            distribution of plain sampling, and more tokens than any other test. ``"coupled"`` (Gumbel coupling,
            arXiv 2408.07978): the very text of plain sampling with that seed, for any draft and lookahead. Greedy
            decoding needs no choice.
        stop_token_ids: a row ends with the first of these tokens; None means the model's end-of-text token.
        stop_strings: a row ends with the token that completes one; needs ``target.tokenizer``. Only new text counts.
        on_token: called as ``on_token(row, token)`` for every committed token, in order.
        on_commit: called once a round with all tokens that it committed; each says whether it came from the draft.
        on_prefill: called now and then while prompts are read, with how many tokens were read since the last call.
        output_logits: also return the logits.
        logits_processor: called as ``logits_processor(row, tokens, logits)`` for one position at a time, with the text
            before it and its logits (V), which it may change or replace and must return; -inf forbids a token. Penalty
            and filters come after it. It must depend on its arguments alone: it also sees drafted tokens, though none
            that it has forbidden, and the draft's logits.
        cache: goes on from the texts it holds, with which the prompts must begin, and follows this call's; an empty
            ``GenerationCache()`` is filled. Greedy and coupled text is bit for bit that of one longer call.
        executor: ``"graph"`` runs a whole round as one CUDA graph, and queues two rounds ahead, so that tokens are seen
            up to two rounds late. The text is bit for bit that of ``"eager"``. It takes no Python: neither plain
            drafters nor a logits_processor. A ``GraphExecutor()`` of your own keeps its graphs for later calls.

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
    stop_token_ids = end_of_text(target) if stop_token_ids is None else stop_token_ids
    check_generation(
        target, len(prompts), lookahead=lookahead, max_new_tokens=max_new_tokens, sampling=sampling,
        acceptance=acceptance, stop_strings=stop_strings, stop_token_ids=stop_token_ids, on_token=on_token,
        on_commit=on_commit, on_prefill=on_prefill, logits_processor=logits_processor, cache=cache,
    )  # fmt: skip
    max_new_tokens = int(max_new_tokens)
    tokenizer = tokenizer_of(target) if stop_strings else None
    batch = Batch(len(prompts))
    executor = as_executor(executor)
    draft = None if draft is None else as_draft(draft, target, batch.texts, executor.captures)
    drafting = None if draft is None else draft.model
    executor.check([target] if drafting is None else [target, drafting], logits_processor)
    if cache is not None:
        known_by = draft if drafting is None else drafting
        cache.open(prompts, target, known_by if draft is not None and draft.stateful else None)
    if max_new_tokens == 0:
        stats, nothing = GenerationStats(prompt_tokens=sum(map(len, prompts))), [[] for _ in prompts]
        return _result(target, prompts, ["length"] * len(prompts), stats, nothing if output_logits else None, cache)
    pair = cost_key(target, drafting) if lookahead == "auto" else None
    costs = pair and (pair, len(prompts), executor.captures)
    chooser = as_lookahead(lookahead, 0 if draft is None else max_new_tokens - 1, costs)
    params = of_rows(sampling, len(prompts))

    def tell(committed: list[CommittedToken]) -> None:
        if on_commit is not None:
            on_commit(committed)
        for row, token, _ in committed if on_token is not None else ():
            on_token(row, token)

    loop = None
    with executor:
        try:
            loop = DecodeLoop(
                target, draft if max(chooser.all) else None, batch, executor, chooser, [its for its, _ in params],
                coupled=acceptance == "coupled", processor=logits_processor, on_commit=tell,
                on_prefill=on_prefill, prompt_length=max(map(len, prompts)), max_new_tokens=max_new_tokens,
            )  # fmt: skip
            for row, (prompt, (its, rng_key)) in enumerate(zip(prompts, params, strict=True)):
                states = (cache.target_states[row], cache.draft_states[row]) if cache is not None else (None, None)
                stream = TextStream(tokenizer, stop_strings, prompt) if stop_strings else None
                loop.admit(
                    row, prompt, its, max_new_tokens, rng_key=rng_key, states=states, stop_token_ids=stop_token_ids,
                    stream=stream, output_logits=output_logits, chunk=None if on_prefill is None else _PREFILL_TOKENS,
                )  # fmt: skip
            while batch.reading:
                loop.read(_PREFILL_TOKENS)
            while batch.generating():
                loop.step()
        finally:
            if loop is not None:
                loop.close(cache, prompts)
            executor.close()
    reasons, logits = [row.finish_reason for row in batch.rows], [row.logits for row in batch.rows]
    return _result(target, batch.texts(), reasons, loop.stats, logits if output_logits else None, cache)


def _result(
    target: LanguageModel,
    texts: list[list[int]],
    reasons: list[str],
    stats: GenerationStats,
    logits: list[list[torch.Tensor]] | None,
    cache: GenerationCache | None,
) -> GenerationResult:
    none = torch.empty(0, target.vocab_size, dtype=torch.float32, device=target.device)
    return GenerationResult(
        sequences=[torch.tensor(text, dtype=torch.int64, device="cpu") for text in texts],
        finish_reasons=reasons,
        stats=stats,
        logits=logits and [torch.stack(rows) if rows else none for rows in logits],
        cache=cache,
    )
