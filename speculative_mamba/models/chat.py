"""Chat templates: from messages to the text that a model was trained to answer."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..ops.values import reason, shown
from .files import check_regular, is_there, read_json

CHAT_TEMPLATE, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True)
class ChatTemplate:
    """Templates in Jinja's language by name, and the special tokens that they may write. origin: the file.

    A template is a program that comes with a model, so it runs in Jinja's sandbox, on copies made of plain values.
    """

    origin: Path
    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def render(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The text of a conversation, as ``apply_chat_template`` of transformers gives it; see ``chat_prompt``.

        Raises:
            ValueError: messages or variables are of the wrong kind; the template refuses them, or is broken.
        """
        messages = _checked(messages)
        variables = {"tools": None, "documents": None} | _plain(variables, "variables of a chat template")
        name = "tool_use" if variables["tools"] is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ValueError(f"{self.origin} has no default chat template, only {shown(', '.join(self.sources))}")
        variables |= {"messages": messages, "add_generation_prompt": bool(add_generation_prompt)}
        try:
            return _compiled(self.sources[name]).render({**self.special_tokens, **variables})
        except _RefusalError as refusal:
            raise ValueError(f"the chat template of {self.origin} refuses the messages: {reason(refusal)}") from None
        except Exception as error:  # of any kind: the template is somebody else's program
            what = f"{type(error).__name__}: {reason(error)}"
            raise ValueError(f"the chat template of {self.origin} cannot be used: {what}") from None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """That of a checkpoint: ``chat_template.jinja``, else ``chat_template`` of ``tokenizer_config.json``, which is a
    template or several with names. None if there is none.

    Raises:
        ValueError: a file is broken.
    """
    settings = _read_if_there(folder / TOKENIZER_CONFIG)
    origin = folder / CHAT_TEMPLATE
    if is_there(origin):
        check_regular(origin)
        try:
            found = origin.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{origin} cannot be read: {error}") from None
    else:
        origin, found = folder / TOKENIZER_CONFIG, settings.get("chat_template")
    if found is None:
        return None
    if "added_tokens_decoder" not in settings:  # older tokenizers have their special tokens in a file of their own
        settings |= _read_if_there(folder / SPECIAL_TOKENS_MAP)
    return ChatTemplate(origin, _by_name(found, origin), _special_tokens(settings, folder))


def chat_template_of(tokenizer: object) -> ChatTemplate | None:
    """That of a tokenizer of transformers; None if there is none."""
    found, origin = getattr(tokenizer, "chat_template", None), Path(type(tokenizer).__name__)
    if found is None:
        return None
    if isinstance(found, Mapping):
        found = [{"name": name, "template": template} for name, template in found.items()]
    return ChatTemplate(origin, _by_name(found, origin), _special_tokens(tokenizer.special_tokens_map, origin))


def _read_if_there(path: Path) -> dict:
    return read_json(path) if is_there(path) else {}


def _by_name(found: object, origin: Path) -> dict[str, str]:
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError(f"{origin}: chat_template must be a text, or a list of texts with names, got {shown(found)}")
    return named


def _special_tokens(settings: Mapping[str, object], folder: Path) -> dict[str, str]:
    """By name: the usual ones, others called ``…_token``, and those that are in an object of their own."""
    named = {name: entry for name, entry in settings.items() if name.endswith("_token")}
    for key in _MORE_TOKENS:
        named |= settings[key] if isinstance(settings.get(key), dict) else {}
    tokens = {}
    for name, entry in named.items():
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            tokens[name] = token
        elif entry is not None and name in _SPECIAL_TOKENS:
            raise ValueError(f"{folder}: {name} of the tokenizer must be a text, got {shown(entry)}")
    return tokens


def _checked(messages: object) -> list[dict]:
    """Messages as plain values, without keys that hold None, which templates would write out."""
    plain = _plain(messages, "messages")
    if not isinstance(plain, list) or not plain or not all(isinstance(message, dict) for message in plain):
        raise ValueError(f"messages must be a list of dicts with role and content, got {shown(messages)}")
    plain = [{key: value for key, value in message.items() if value is not None} for message in plain]
    for message in plain:
        if not isinstance(message.get("role"), str):
            raise ValueError(f"a message needs a role, such as user, got {shown(message)}")
        content = message.get("content", "" if "tool_calls" in message else None)
        if not isinstance(content, str | list | dict):
            raise ValueError(f"a message needs a content, a text or parts of one, got {shown(message)}")
    return plain


def _plain(value: object, name: str) -> object:
    """A copy made of what JSON has: a template meets no object with methods of its own."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be made of texts, numbers, lists and dicts: {reason(error)}") from None


class _RefusalError(TemplateError):
    """A template called ``raise_exception``."""


class _Generation(Extension):
    """``{% generation %}`` marks what a model is trained to write; a prompt holds it like any other text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: object) -> None:
    raise _RefusalError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)
