"""Text as it grows: whole characters only, and nothing behind a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns tokens into text piece by piece and finds stop strings.

    ``push`` returns what can be shown: characters that are complete and cannot be the start of a stop string. After a
    stop string was found, ``stopped`` is set and the text ends before it. The pieces plus ``finish()`` are the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._text = ""  # what the decoder gave so far
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        self._tokens.append(token)
        piece = self._decoder.step(self._tokenizer, token) or ""
        self._text += piece
        if self.stopped or not piece:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop_strings) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back: the possible start of a stop string that never came, an unfinished character."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._tokens)
        rest = whole[len(self._text) :] if whole.startswith(self._text) else ""
        held, self._held = self._held + rest, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
