"""What is asked of an engine, and whether it can be done."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..decode.inputs import check_generation, end_of_text
from ..decode.sampling import MAX_BIASED, SamplingParams
from ..models.prompts import read_prompts
from ..models.runner import LanguageModel
from ..ops.values import is_int, shown


@dataclass(frozen=True)
class Request:
    """One text that is wanted.

    prompt: token ids, at least one. stop_token_ids: the text ends with the first of them; None: the model's end-of-text
    tokens, (): none. stop_strings: it ends before the first of them; they need the target's tokenizer. use_draft: False
    decodes this text plainly. logprobs: n, from 0 to 20, gives the log-probability of each token and of the n likeliest
    ones in its place; None gives none.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 64
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    use_draft: bool = True
    logprobs: int | None = None


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can be served, with what its defaults stand for. rng_key: seed and stream."""

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    rng_key: tuple[int, int]
    stop_token_ids: Sequence[int]
    stop_strings: Sequence[str]
    use_draft: bool
    logprobs: int | None


def checked(request: Request, target: LanguageModel, max_length: int | None) -> CheckedRequest:
    """
    Raises:
        ValueError: the first thing that is out of range.
    """
    if not isinstance(request, Request):
        raise ValueError(f"submit takes a Request, got {type(request).__name__}")
    [prompt] = read_prompts([request.prompt], None, target, may_be_padded=False)
    sampling = request.sampling
    stops = end_of_text(target) if request.stop_token_ids is None else request.stop_token_ids
    check_generation(
        target, 1, lookahead=1, max_new_tokens=request.max_new_tokens, sampling=sampling, acceptance="rejection",
        stop_strings=request.stop_strings, stop_token_ids=stops, logprobs=request.logprobs,
    )  # fmt: skip
    if not isinstance(sampling, SamplingParams) or not is_int(sampling.seed):
        raise ValueError(f"sampling of a request must be SamplingParams with one seed, got {shown(sampling)}")
    _check_bias(sampling, target.vocab_size)
    if not isinstance(request.use_draft, bool):
        raise ValueError(f"use_draft must be True or False, got {shown(request.use_draft)}")
    if max_length is not None and len(prompt) + request.max_new_tokens > max_length:
        raise ValueError(
            f"the prompt's {len(prompt)} tokens and max_new_tokens {request.max_new_tokens} exceed the engine's "
            f"max_length of {max_length} tokens; shorten one of them"
        )
    return CheckedRequest(
        prompt, int(request.max_new_tokens), sampling, (sampling.seed, 0), tuple(stops), tuple(request.stop_strings),
        request.use_draft, request.logprobs,
    )  # fmt: skip


def _check_bias(sampling: SamplingParams, vocabulary: int) -> None:
    if len(sampling.logit_bias) > MAX_BIASED:
        raise ValueError(f"logit_bias names {len(sampling.logit_bias)} tokens; at most {MAX_BIASED} are possible")
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise ValueError(f"logit_bias is for token {token}, outside the vocabulary of {vocabulary} tokens")
