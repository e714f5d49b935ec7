"""What single tokens look like: their bytes, which need not be whole characters."""

from tokenizers import Tokenizer

from ..models.detokenizer import UNFINISHED

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that GPT-2's alphabet leaves as is


def _byte_alphabet() -> dict[str, int]:
    """Character → byte in vocabularies of GPT-2's kind (Radford et al. 2019)."""
    hidden = [byte for byte in range(256) if byte not in _VISIBLE]
    return {chr(byte): byte for byte in _VISIBLE} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


class TokenText:
    """Bytes and text of tokens, as OpenAI's ``logprobs`` show them. Token ids without a text have none."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = b"" if self._tokenizer is None else self._look_up(token)
        return self._known[token]

    def text_of(self, token: int) -> str:
        """The token's text; for a part of a character ``bytes:\\xe2``, so that different tokens differ."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _look_up(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        first, text = self._decode([token]), self._decode([token, token])
        text = text[len(first) :] if text.startswith(first) else first  # decoders drop the space of a first token
        if UNFINISHED not in text:
            return text.encode()
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        if all(character in _ALPHABET for character in name):
            return bytes(map(_ALPHABET.__getitem__, name))
        return text.encode()

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
