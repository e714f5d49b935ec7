"""``--chat`` without a prompt: a conversation in which each turn reads only what is new."""

import contextlib
import sys
from collections.abc import Sequence

from ..decode import GenerationCache
from ..models import MambaLM, encode_continuation
from ..models.text import TextStream
from ..models.tokenizer import encode, text_tokenizer
from ..streams import Terminated, exit_code, say, write
from .session import Session

_EXIT = "/exit"


class Conversation:
    """Messages, and a cache of the text that the chat template made of them.

    Raises:
        ValueError: there is no chat template or no tokenizer, or the template refuses the messages.
    """

    def __init__(self, target: MambaLM, messages: Sequence[dict[str, str]] = ()) -> None:
        self.cache, self._messages = GenerationCache(), list(messages)
        self._target, self._tokenizer = target, text_tokenizer(target)
        self._text = ""  # of the tokens in the cache
        target.chat_prompt([*messages, _said("user", "Hello")])  # what no message of a user could repair

    def ask(self, content: str) -> list[int]:
        """The prompt for an answer. It goes on from the cache, which starts anew where the template now writes earlier
        turns in another way.

        Raises:
            ValueError: the template refuses the message, which then was not said.
        """
        messages = [*self._messages, _said("user", content)]
        text = self._target.chat_template.render(messages)
        known = self.cache.sequences[0] if self.cache.sequences else []
        new = text.removeprefix(self._text) if known else text
        if known and new and new != text:
            prompt = known + encode_continuation(self._tokenizer, new)
        else:
            self.cache, prompt = GenerationCache(), encode(self._tokenizer, text, special_tokens=False)
        self._messages, self._text = messages, text
        return prompt

    def answered(self, prompt: list[int], stop_strings: Sequence[str]) -> None:
        """Takes what the cache has behind a prompt. Where that is nothing, the question was not asked."""
        tokens = self.cache.sequences[0][len(prompt) :] if self.cache.sequences else []
        if not tokens:
            self._messages.pop()
            self.cache = GenerationCache()
            return
        self._text += _text_of(TextStream(self._tokenizer, (), prompt, skip_special_tokens=False), tokens)
        content = _text_of(TextStream(self._tokenizer, stop_strings, prompt), tokens)
        self._messages.append(_said("assistant", content))


def converse(session: Session, messages: Sequence[dict[str, str]]) -> int:
    """Answers line after line of stdin until ``/exit`` or its end. Ctrl-C ends an answer alone. The exit code."""
    conversation = Conversation(session.target, messages)
    if sys.stdin.isatty():
        say(f"{_EXIT} or Ctrl-D ends the conversation, Ctrl-C an answer")
    while (line := _read_line()) is not None and line.strip() != _EXIT:
        try:
            prompt = conversation.ask(line) if line.strip() else None
        except ValueError as error:
            say(f"error: {error}")
            continue
        if prompt is None:
            continue
        text = session.new_text(prompt)
        session.run(text, "", conversation.cache)
        conversation.answered(prompt, session.options.stop)
        session.finish(text, "")
        if isinstance(text.interrupt, Terminated):
            return exit_code(text.interrupt)
    return 0


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text_of(stream: TextStream, tokens: Sequence[int]) -> str:
    return "".join(map(stream.push, tokens)) + stream.finish()


def _read_line() -> str | None:
    """A line of stdin without its end; None: there is none. With history and editing on a terminal."""
    terminal = sys.stdin.isatty()
    if terminal and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() uses it
        try:
            return input("> ")
        except EOFError:
            write("\n")
            return None
    if terminal:
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline()
    return line.decode(errors="surrogateescape").removesuffix("\n") if line else None
