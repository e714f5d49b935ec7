"""Text of tokens that come one by one."""

from collections.abc import Sequence

from tokenizers import Tokenizer

MAX_RUN = 64  # bytes that are held until the run ends which they belong to
UNFINISHED = "\ufffd"  # stands for bytes that are no character, or not yet


class Detokenizer:
    """The text of tokens that come one by one: together it is what decoding all at once gives behind the prompt.

    What a token looks like depends on its neighbours: a decoder drops the space of the first one, and joins bytes to
    characters. Therefore tokens are decoded behind the few before them, and again until nothing that follows can change
    them. Decoders with byte-fallback spoil a whole run of byte tokens (``<0x0A>``) when one byte of it is wrong, so the
    text of a run is final when it ends, when it is spoilt, or after ``MAX_RUN`` bytes.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._tokens: list[int] = []  # whose text is not final
        self.pending = ""  # the text of those, if nothing followed
        start = len(prompt) - self._run_length(prompt)
        run = list(prompt[start:])
        # What follows whole characters is a run of its own.
        self._set_context(prompt[max(start - 8, 0) : start], run if self._decode(run).endswith(UNFINISHED) else [])

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is final with it."""
        if self._tokenizer.id_to_token(token) is None:
            return ""
        tokens, before = self._tokens, self.pending
        tokens.append(token)
        self.pending = self._text_of(tokens)
        if run := self._run_length(tokens):
            earlier = self._run if run == len(tokens) else []
            joined = [*earlier, *tokens[-run:]]
            is_text = self._is_text(joined)
            if is_text is None:
                spoilt = earlier if self._is_text(earlier) is None else joined
                self._set_context(tokens[:-run] or self._context, spoilt)
                return self._take_text(keep=0)
            if is_text and run >= MAX_RUN and self._context:
                self._set_context(self._context)
                return self._take_text(keep=0)
        elif not (self.pending or self._before).endswith(UNFINISHED):
            if text := self._decode(tokens):
                self._context, self._run, self._before = tokens, [], text
            else:
                self._set_context(self._context + self._run + tokens)
            final, self._tokens, self.pending = self.pending, [], ""
            return final
        elif len(tokens) > 1:
            # Where the last token adds what it is on its own, it does not complete what was unfinished before it.
            unfinished = self._before.endswith(UNFINISHED)
            alone = self._decode([token]) if unfinished else self._text_of([token])
            if alone and self.pending == before + alone:
                if unfinished:
                    self._set_context(tokens[:-1])
                return self._take_text(keep=1)
        return ""

    def _take_text(self, keep: int) -> str:
        """The text of all pending tokens but the last ``keep``, which stay pending."""
        kept = self._tokens[len(self._tokens) - keep :]
        left = self._text_of(kept) if kept else ""
        text = self.pending[: len(self.pending) - len(left)]
        self._tokens, self.pending = kept, left
        return text

    def _set_context(self, context: Sequence[int], run: Sequence[int] = ()) -> None:
        """Tokens before the pending ones: some that end cleanly, then a run of bytes that is not over, if any."""
        self._context, self._run = list(context), list(run)
        self._before = self._decode([*context, *run])

    def _text_of(self, tokens: list[int]) -> str:
        """What tokens add behind the context."""
        text = self._decode(self._context + self._run + tokens)
        if text.startswith(self._before):
            return text[len(self._before) :]
        pairs = enumerate(zip(text, self._before, strict=False))
        return text[next((at for at, (new, old) in pairs if new != old), len(text)) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _run_length(self, tokens: Sequence[int]) -> int:
        """How many byte tokens are at the end."""
        count = 0
        while count < len(tokens) and self._byte(tokens[-1 - count]):
            count += 1
        return count

    def _is_text(self, run: Sequence[int]) -> bool | None:
        """Whether byte tokens are whole characters; None if they cannot become any."""
        try:
            b"".join(map(self._byte, run)).decode()
        except UnicodeDecodeError as error:
            return False if error.reason == "unexpected end of data" else None
        return True

    def _byte(self, token: int) -> bytes:
        """The byte that a byte-fallback token stands for, b"" for other tokens."""
        if token not in self._bytes:
            name = self._tokenizer.id_to_token(token) or ""
            digits = name[3:5] if len(name) == 6 and name.startswith("<0x") and name.endswith(">") else ""
            is_byte = digits.isalnum() and digits.isascii() and self._decode([token]) != name
            self._bytes[token] = bytes.fromhex(digits) if is_byte else b""
        return self._bytes[token]
