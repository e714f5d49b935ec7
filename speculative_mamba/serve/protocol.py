"""Calls of OpenAI's API as requests of an engine."""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..decode.inputs import end_of_text
from ..decode.sampling import SamplingParams
from ..models.language_model import MambaLM
from ..models.prompts import read_prompts
from ..models.tokenizer import encode, text_tokenizer, tokenizer_of
from ..ops.values import shown
from .fields import CHAT, COMPLETION, MAX_CHOICES, NEUTRAL_CHAT, NEUTRAL_COMPLETION, SAMPLING, ApiError, read_fields
from .request import Request
from .token_text import TokenText

COMPLETION_TOKENS = 16  # OpenAI's max_tokens of a completion that names none
OPENAI_SAMPLING = SamplingParams(temperature=1.0)
_SEEDS = 2**63


@dataclass(frozen=True)
class ServedModel:
    """A model and how calls may use it.

    name: what calls name it. max_length: tokens of a prompt and its text together. max_choices: texts that a call may
    ask for. default_sampling: parameters of calls that leave them out. draft: who drafts, for people to read.
    """

    target: MambaLM
    name: str
    max_length: int
    default_sampling: SamplingParams = OPENAI_SAMPLING
    max_choices: int = MAX_CHOICES
    draft: str | None = None

    @functools.cached_property
    def token_text(self) -> TokenText:
        return TokenText(tokenizer_of(self.target))

    @property
    def chats(self) -> bool:
        return self.target.chat_template is not None


@dataclass(frozen=True)
class Call:
    """One call of the API. requests: ``n`` for each prompt, in the order of the choices. echoes: by prompt, the text
    that stands before the new one. include_usage, continuous_usage: a stream ends with its counts, and has them so far
    in every chunk."""

    chat: bool
    requests: list[Request]
    n: int
    echoes: list[str]
    stream: bool
    include_usage: bool
    continuous_usage: bool

    def echo(self, choice: int) -> str:
        return self.echoes[choice // self.n]


def recommended_sampling(target: MambaLM) -> SamplingParams:
    """What calls get that name no parameters: as in vLLM, what the model's ``generation_config.json`` states, and
    OpenAI's defaults for the rest.

    Raises:
        ValueError: it states what is not supported.
    """
    stated = target.default_sampling
    return dataclasses.replace(stated, temperature=stated.temperature or 1.0)


def read_completion(body: object, served: ServedModel) -> Call:
    """The body of ``/v1/completions``.

    Raises:
        ApiError: it is not one that can be answered.
    """
    fields = read_fields(body, COMPLETION, NEUTRAL_COMPLETION)
    _check_model(fields, served)
    if "prompt" not in fields:
        raise ApiError("prompt is missing", param="prompt")
    budget, special_tokens = fields.get("max_tokens", COMPLETION_TOKENS), fields.get("add_special_tokens", True)
    _check_choices(fields, len(fields["prompt"]), served)

    def ids(prompt: str | list[int]) -> list[int]:
        return encode(text_tokenizer(served.target), prompt, special_tokens) if isinstance(prompt, str) else prompt

    prompts = _blaming("prompt", lambda: [ids(prompt) for prompt in fields["prompt"]])
    _check_lengths("prompt", prompts, budget, served)
    prompts = _blaming("prompt", lambda: read_prompts(prompts, None, served.target, may_be_padded=False))
    echoes = [""] * len(prompts)
    if fields.get("echo", False):
        if "logprobs" in fields:
            raise ApiError("echo together with logprobs is not supported here", param="echo", code="unsupported_value")
        echoes = _blaming("echo", lambda: [_text(prompt, served) for prompt in fields["prompt"]])
    return _call(fields, served, prompts, echoes, budget, fields.get("logprobs"), chat=False)


def read_chat(body: object, served: ServedModel) -> Call:
    """The body of ``/v1/chat/completions``.

    Raises:
        ApiError: it is not one that can be answered.
    """
    fields = read_fields(body, CHAT, NEUTRAL_CHAT)
    _check_model(fields, served)
    if "messages" not in fields:
        raise ApiError("messages is missing", param="messages")
    _check_choices(fields, 1, served)
    variables = fields.get("chat_template_kwargs", {})
    if taken := {"self", "messages", "add_generation_prompt"} & variables.keys():
        raise ApiError(f"chat_template_kwargs must not hold {taken.pop()}", param="chat_template_kwargs")
    prompt = _blaming("messages", lambda: served.target.chat_prompt(fields["messages"], **variables))
    if not prompt:
        raise ApiError("the chat template makes an empty prompt of these messages", param="messages")
    wanted = fields.get("logprobs", False)
    if "top_logprobs" in fields and not wanted:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    newer = fields.get("max_completion_tokens")
    if newer is not None and fields.setdefault("max_tokens", newer) != newer:
        raise ApiError("max_tokens is the older name of max_completion_tokens; give one", param="max_tokens")
    logprobs = fields.get("top_logprobs", 0) if wanted else None
    budget = fields.get("max_tokens", max(served.max_length - len(prompt), 1))
    _check_lengths("messages", [prompt], budget, served)
    return _call(fields, served, [prompt], [""], budget, logprobs, chat=True)


def _call(
    fields: dict,
    served: ServedModel,
    prompts: list[list[int]],
    echoes: list[str],
    budget: int,
    logprobs: int | None,
    chat: bool,
) -> Call:
    """What both kinds of calls have in common."""
    n, stream = fields.get("n", 1), fields.get("stream", False)
    if "stream_options" in fields and not stream:
        raise ApiError("stream_options needs stream: true", param="stream_options")
    seed = fields.get("seed", secrets.randbelow(_SEEDS))
    own = {name: fields[name] for name in SAMPLING if name in fields}
    sampling = dataclasses.replace(served.default_sampling, **own)
    _check_tokens("logit_bias", [token for token, _ in sampling.logit_bias], served)
    _check_tokens("stop_token_ids", fields.get("stop_token_ids", []), served)
    requests = [
        Request(
            prompt=prompt, max_new_tokens=budget, stop_token_ids=_stop_tokens(fields, served),
            sampling=dataclasses.replace(sampling, seed=(seed + choice) % _SEEDS),
            stop_strings=fields.get("stop", ()), use_draft=fields.get("use_draft", True), logprobs=logprobs,
        )
        for prompt in prompts
        for choice in range(n)
    ]  # fmt: skip
    options = fields.get("stream_options", {})
    include_usage = options.get("include_usage", False)
    continuous_usage = include_usage and options.get("continuous_usage_stats", False)
    return Call(chat, requests, n, echoes, stream, include_usage, continuous_usage)


def _check_model(fields: dict, served: ServedModel) -> None:
    name = fields.get("model", served.name)
    if name != served.name:
        raise model_not_found(name, served)


def model_not_found(name: str, served: ServedModel) -> ApiError:
    return ApiError(
        f"the model {shown(name)} does not exist; this server has {shown(served.name)}",
        param="model", code="model_not_found", status=404,
    )  # fmt: skip


def _check_choices(fields: dict, prompts: int, served: ServedModel) -> None:
    n = fields.get("n", 1)
    if n * prompts > served.max_choices:
        raise ApiError(f"{prompts} prompts, {n} times each, are more than {served.max_choices} choices", param="n")


def _check_lengths(param: str, prompts: Sequence[Sequence[int]], budget: int, served: ServedModel) -> None:
    for length in map(len, prompts):
        if length + budget > served.max_length:
            raise ApiError(
                f"the model's maximum context length is {served.max_length} tokens; this call needs {length + budget}, "
                f"{length} for the prompt and {budget} for the new text",
                param=param, code="context_length_exceeded",
            )  # fmt: skip


def _check_tokens(name: str, tokens: Sequence[int], served: ServedModel) -> None:
    unknown = [token for token in tokens if not 0 <= token < served.target.vocab_size]
    if unknown:
        raise ApiError(f"{name} names {shown(unknown[0])}, which is no token of the model", param=name)


def _stop_tokens(fields: dict, served: ServedModel) -> list[int]:
    """The model's own, and those that the call names."""
    own = [] if fields.get("ignore_eos", False) else end_of_text(served.target)
    return [*own, *fields.get("stop_token_ids", [])]


def _text(prompt: str | list[int], served: ServedModel) -> str:
    return prompt if isinstance(prompt, str) else text_tokenizer(served.target).decode(prompt)


def _blaming(param: str, read: Callable[[], list]) -> list:
    """What ``read`` returns; a ValueError is the fault of this field."""
    try:
        return read()
    except ValueError as error:
        raise ApiError(str(error), param=param) from None
