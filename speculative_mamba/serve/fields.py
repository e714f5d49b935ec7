"""Fields of a request body: each is read, known to change nothing, or refused by name."""

from collections.abc import Callable, Mapping

from ..decode.inputs import MAX_NEW_TOKENS
from ..decode.logprobs import MAX_LOGPROBS
from ..decode.sampling import MAX_BIASED, SamplingParams
from ..ops.values import is_int, shown

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # every token is compared with every stop string
_ROLES = ("system", "developer", "user", "assistant")

Reader = Callable[[str, object], object]  # name and value → value; ValueError says what the value must be


class ApiError(ValueError):
    """A refusal as OpenAI's API has it: one line, the field that is to blame, a code for programs, an HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.kind = param, code, status, kind

    def body(self) -> dict:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def read_fields(body: object, supported: Mapping[str, Reader], neutral: Mapping[str, Reader]) -> dict[str, object]:
    """The values of a body's supported fields. ``null`` is as good as absent.

    neutral: fields that are accepted because they have no effect on the text.

    Raises:
        ApiError: the first field that is of another name or holds what it must not.
    """
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, got {shown(body)}")
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in supported and name not in neutral:
            raise ApiError(f"{_name(name)} is not supported here", param=_name(name), code="unsupported_parameter")
    return {name: _read(name, given[name], {**neutral, **supported}[name]) for name in given}


def _read(name: str, value: object, reader: Reader) -> object:
    try:
        return reader(name, value)
    except ApiError:
        raise
    except ValueError as error:
        raise ApiError(str(error), param=name) from None


def _name(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 60 else shown(name)


def integer(lo: int, limit: int) -> Reader:
    def read(name: str, value: object) -> int:
        if not is_int(value) or not lo <= value <= limit:
            raise ValueError(f"{name} must be a whole number from {lo} to {limit}, got {shown(value)}")
        return value

    return read


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return value


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    return value


def mapping(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {shown(value)}")
    return value


def only(*values: object) -> Reader:
    """Values that are what the server does anyway."""

    def read(name: str, value: object) -> object:
        if not any(type(value) is type(one) and value == one for one in values):
            raise ApiError(f"{name} = {shown(value)} is not supported here", param=name, code="unsupported_value")
        return value

    return read


def sampling(name: str, value: object) -> object:
    """A field of ``SamplingParams``."""
    return getattr(SamplingParams(**{name: value}), name)


def top_k(name: str, value: object) -> object:
    """-1 keeps all tokens, as vLLM has it."""
    return sampling(name, 0 if is_int(value) and value == -1 else value)


def logit_bias(name: str, value: object) -> object:
    """JSON has texts for keys."""
    pairs = mapping(name, value)
    if len(pairs) > MAX_BIASED:
        raise ValueError(f"{name} must name at most {MAX_BIASED} tokens, got {len(pairs)}")
    for token in pairs:
        if not (token.isascii() and token.isdigit() and len(token) < 20):
            raise ValueError(f"{name} must be an object from token ids to numbers, got the id {shown(token)}")
    return sampling(name, [(int(token), bias) for token, bias in pairs.items()])


def stop(name: str, value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or len(stops) > MAX_STOPS or not all(map(_is_stop, stops)):
        limits = f"of 1 to {MAX_STOP_LENGTH} characters"
        raise ValueError(f"{name} must be a text {limits}, or a list of at most {MAX_STOPS}; got {shown(value)}")
    return tuple(stops)


def _is_stop(value: object) -> bool:
    """JSON can write half of a surrogate pair, which no text holds."""
    is_text = isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    return is_text and 0 < len(value) <= MAX_STOP_LENGTH


def token_ids(name: str, value: object) -> list[int]:
    if not isinstance(value, list) or not all(map(is_int, value)):
        raise ValueError(f"{name} must be a list of token ids, got {shown(value)}")
    return value


def prompt(name: str, value: object) -> list[str] | list[list[int]]:
    """One or several texts, or token ids of one or several."""
    several = value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(map(is_int, value)):
        several = [value]
    is_text = all(isinstance(one, str) for one in several)
    if not several or not (is_text or all(isinstance(one, list) and one and all(map(is_int, one)) for one in several)):
        raise ValueError(
            f"{name} must be a text, a list of texts, a list of token ids or a list of such lists, none of them empty; "
            f"got {shown(value)}"
        )
    return several


def messages(name: str, value: object) -> list[dict]:
    """A conversation with contents of text alone; ``developer`` is OpenAI's newer name of ``system``."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of at least one message, got {shown(value)}")
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, message: object) -> dict:
    given = {name: value for name, value in mapping(where, message).items() if value not in (None, [])}
    for name in given:
        if name not in ("role", "content", "name"):
            param = f"{where}.{_name(name)}"
            raise ApiError(f"{param} is not supported here", param=param, code="unsupported_parameter")
    role, name = given.get("role"), given.get("name")
    if role not in _ROLES:
        raise ApiError(f"{where}.role must be one of {', '.join(_ROLES)}; got {shown(role)}", param=f"{where}.role")
    read = {"role": "system" if role == "developer" else role}
    read["content"] = _content(f"{where}.content", given.get("content"))
    return read if name is None else {**read, "name": _read(f"{where}.name", name, text)}


def _content(where: str, content: object) -> str:
    """The text of a content in one piece or several, which stand on lines of their own."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{where} must be a text or a list of parts, got {shown(content)}", param=where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            wanted = '{"type": "text", "text": …}'
            raise ApiError(f"{where}: a part must be {wanted}, got {shown(part)}", param=where)
    return "\n".join(part["text"] for part in content)


def stream_options(name: str, value: object) -> dict:
    supported, neutral = {"include_usage": flag, "continuous_usage_stats": flag}, {"include_obfuscation": only(False)}
    try:
        return read_fields(mapping(name, value), supported, neutral)
    except ApiError as error:
        if error.param is None:
            raise
        param = f"{name}.{error.param}"
        raise ApiError(f"{name}.{error}", param=param, code=error.code) from None


_SHARED: dict[str, Reader] = {
    "model": text, "max_tokens": integer(1, MAX_NEW_TOKENS), "n": integer(1, MAX_CHOICES),
    "seed": integer(0, 2**63 - 1), "stop": stop, "stream": flag, "stream_options": stream_options,
    "temperature": sampling, "top_p": sampling, "top_k": top_k, "min_p": sampling, "repetition_penalty": sampling,
    "presence_penalty": sampling, "frequency_penalty": sampling, "logit_bias": logit_bias, "ignore_eos": flag,
    "stop_token_ids": token_ids, "use_draft": flag,
}  # fmt: skip
COMPLETION: dict[str, Reader] = _SHARED | {
    "prompt": prompt, "echo": flag, "logprobs": integer(0, MAX_LOGPROBS), "add_special_tokens": flag,
}  # fmt: skip
CHAT: dict[str, Reader] = _SHARED | {
    "messages": messages, "max_completion_tokens": integer(1, MAX_NEW_TOKENS), "logprobs": flag,
    "top_logprobs": integer(0, MAX_LOGPROBS), "chat_template_kwargs": mapping,
}  # fmt: skip
_SHARED_NEUTRAL: dict[str, Reader] = {"user": text, "skip_special_tokens": only(True)}
NEUTRAL_COMPLETION: dict[str, Reader] = _SHARED_NEUTRAL | {"best_of": only(1), "suffix": only("")}
NEUTRAL_CHAT: dict[str, Reader] = _SHARED_NEUTRAL | {
    "metadata": mapping, "safety_identifier": text, "prompt_cache_key": text, "prompt_cache_options": mapping,
    "prompt_cache_retention": text, "store": only(False), "service_tier": only("auto", "default"),
    "response_format": only({"type": "text"}), "modalities": only(["text"]), "tools": only([]),
    "tool_choice": only("none"), "parallel_tool_calls": flag,
}  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "logit_bias", "seed")  # fmt: skip
