"""Text as it grows: the text of all tokens, in pieces that stay, and nothing behind a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from .detokenizer import UNFINISHED, Detokenizer
from .tokenizer import as_tokenizer

CONTEXT = 128  # tokens of a prompt, of which the last few are needed

_Segments = list[tuple[str, bool]]  # parts of a text, and whether they are shown


class TextStream:
    """Turns new tokens into text piece by piece and finds stop strings.

    tokenizer: a ``tokenizers.Tokenizer``, or a fast one of transformers. prompt: token ids before the new ones.
    Stop strings match the text with its special tokens, which are shown only without ``skip_special_tokens``.

    ``push`` returns what can be shown: text that nothing changes any more and that cannot begin a stop string. After a
    stop string was found, ``stopped`` is set and the text ends before it. The pieces plus ``finish()`` are the text.
    A token costs the same however long the text is.

    Raises:
        ValueError: the tokenizer is of another kind.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer = as_tokenizer(tokenizer)
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._hidden = {token: entry.content for token, entry in added.items() if entry.special}
        self._stop_strings = tuple(stop_strings)
        self._stop_starts = {stop[0] for stop in stop_strings}  # characters
        self._detokenizer = Detokenizer(tokenizer, [token for token in prompt[-CONTEXT:] if token not in self._hidden])
        self._held: _Segments = []  # final text that may be the start of a stop string
        self._marks: list[tuple[int, str]] = []  # hidden tokens within the pending text
        self.stopped = False

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        final = ""
        if token in self._hidden:
            self._marks.append((len(self._detokenizer.pending), self._hidden[token]))
        else:
            final = self._detokenizer.push(token)
        pending = self._detokenizer.pending
        if not (self._held or self._marks) and self._stop_starts.isdisjoint(final + pending):
            return final
        if final or not pending:
            self._held += _interleaved(final, self._marks)
            self._marks = []
        return self._found(pending) if self._stop_strings else self._take(_length(self._held))

    def finish(self) -> str:
        """What was held back: the possible start of a stop string that never came, an unfinished character."""
        if self.stopped:
            return ""
        return self._take(_length(self._held)) + self._detokenizer.pending

    def _found(self, pending: str) -> str:
        """Looks for stop strings; the text that is safe from them."""
        final = "".join(text for text, _ in self._held)
        text = final + "".join(text for text, _ in _interleaved(pending, self._marks))
        if not (pending and text.endswith(UNFINISHED)):
            found = [at for at in (text.find(stop) for stop in self._stop_strings) if at >= 0]
            if found:
                self.stopped = True
                self._held += _interleaved(pending, self._marks)
                return self._take(min(found))
        return self._take(len(final) - max(_overlap(final, stop) for stop in self._stop_strings))

    def _take(self, count: int) -> str:
        """Removes the first ``count`` held characters; those of them that are shown."""
        shown, rest = "", []
        for text, visible in self._held:
            shown += text[:count] if visible else ""
            if text[count:]:
                rest.append((text[count:], visible))
            count = max(count - len(text), 0)
        self._held = rest
        return shown


def _interleaved(text: str, marks: list[tuple[int, str]]) -> _Segments:
    """A text with hidden tokens at their places."""
    segments, done = [], 0
    for at, token in marks:
        segments += [(text[done:at], True), (token, False)]
        done = max(done, min(at, len(text)))
    return [*segments, (text[done:], True)]


def _length(segments: _Segments) -> int:
    return sum(len(text) for text, _ in segments)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
