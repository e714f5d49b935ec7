"""Text while it is being made."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing

import torch

from ..models.runner import LanguageModel
from .cache import GenerationCache
from .call import Call, GenerationResult
from .drafts import Draft, Drafter
from .executors import Executor
from .sampling import LogitsProcessor, SamplingParams


def stream(
    target: LanguageModel,
    prompt: str | torch.Tensor | Sequence[Sequence[int]] | Mapping,
    *,
    draft: LanguageModel | Drafter | Draft | str | None = None,
    lookahead: int | str = 4,
    max_new_tokens: int = 64,
    sampling: SamplingParams | None = None,
    acceptance: str = "rejection",
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    output_logits: bool = False,
    logprobs: int | None = None,
    logits_processor: LogitsProcessor | None = None,
    cache: GenerationCache | None = None,
    executor: Executor | str = "eager",
) -> Generator[str, None, GenerationResult]:
    """Continues one prompt, and yields the new text in pieces, each as soon as a round has committed it.

    The pieces together are ``result.texts[0]``: never half a character, nothing of a stop string, no special tokens.
    Decoding goes on when the next piece is asked for. It ends when the generator is closed, which a ``for`` loop that
    is left does once nobody holds it; a ``cache`` then has the text up to there. The generator returns the result:
    ``result = yield from stream(…)``.

    Arguments are those of ``generate``, for one row, and are checked at once. While a generator is open its thread
    cannot use the same executor for something else.

    Raises:
        ValueError: as ``generate``; there is more than one prompt, or the target has no tokenizer.
    """
    call = Call.of(
        target, prompt, None, draft, sampling=sampling, lookahead=lookahead, max_new_tokens=max_new_tokens,
        acceptance=acceptance, stop_token_ids=stop_token_ids, stop_strings=stop_strings, output_logits=output_logits,
        logprobs=logprobs, logits_processor=logits_processor, cache=cache, executor=executor, with_text=True,
    )  # fmt: skip
    if len(call.prompts) > 1:
        raise ValueError(f"stream takes one prompt, got {len(call.prompts)}; use an Engine, or generate(on_commit=…)")
    return _pieces(call)


def _pieces(call: Call) -> Generator[str, None, GenerationResult]:
    shown = 0
    with closing(call.steps()) as steps:
        for _ in steps:
            pieces = call.batch.rows[0].pieces
            fresh, shown = pieces[shown:], len(pieces)
            yield from filter(None, fresh)
    return call.result()
