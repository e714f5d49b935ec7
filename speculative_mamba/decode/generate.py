"""The loop: propose, verify, accept, commit."""

from collections.abc import Callable, Mapping, Sequence

import torch

from ..models.runner import LanguageModel
from .batch import CommittedToken
from .cache import GenerationCache
from .call import Call, GenerationResult
from .drafts import Draft, Drafter
from .executors import Executor
from .sampling import LogitsProcessor, SamplingParams


@torch.no_grad()
def generate(
    target: LanguageModel,
    prompts: str | Sequence[str] | torch.Tensor | Sequence[Sequence[int]] | Mapping,
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
    logprobs: int | None = None,
    logits_processor: LogitsProcessor | None = None,
    cache: GenerationCache | None = None,
    executor: Executor | str = "eager",
) -> GenerationResult:
    """Continues each prompt, with a draft faster and to the same effect as without.

    Greedy text and its logits are bit for bit those of plain greedy decoding of each row alone. Sampled text has the
    distribution of plain sampling; with ``acceptance="coupled"`` it is the same text.

    Args:
        target: the model whose text is wanted.
        prompts: a text or a list of B, which ``target.tokenizer`` encodes; LongTensor (B, L), or a list of B lists of
            token ids, which may differ in length; also what a tokenizer returns, of tokenizers or transformers, for one
            text or for several. With a cache that holds texts a text is what follows them: nothing is put before it,
            neither a special token nor a space.
        attention_mask: (B, L), 0 where ``prompts`` hold padding, at either end of a row; tokenizers of transformers
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
        logprobs: n, from 0 to 20, also returns the log-probability of each new token and of the n likeliest ones.
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
    call = Call.of(
        target, prompts, attention_mask, draft, sampling=sampling, lookahead=lookahead, max_new_tokens=max_new_tokens,
        acceptance=acceptance, stop_token_ids=stop_token_ids, stop_strings=stop_strings, on_token=on_token,
        on_commit=on_commit, on_prefill=on_prefill, output_logits=output_logits, logprobs=logprobs,
        logits_processor=logits_processor, cache=cache, executor=executor,
    )  # fmt: skip
    if call.max_new_tokens:
        with call.executor:
            try:
                loop = call.open()
                while call.batch.generating():
                    loop.step()
                call.executor.keep()
            finally:
                call.close()
    return call.result()
