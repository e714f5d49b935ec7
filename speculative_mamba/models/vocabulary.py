"""What token ids mean, and whether two models mean the same by them."""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from .chat import TOKENIZER_CONFIG
from .files import is_there, read_json


@dataclass(frozen=True)
class Vocabulary:
    """size: ids are below it. tokens: by id, "" where the id is end of text but no token is known, None where it means
    nothing; or None as a whole where no tokenizer is known."""

    size: int
    tokens: tuple[str | None, ...] | None = None

    @functools.cached_property
    def unused(self) -> frozenset[int]:
        """Ids below ``size`` that mean nothing."""
        return frozenset(token for token, text in enumerate(self.tokens or ()) if text is None)

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(repr(self.tokens).encode("utf-8", "surrogatepass")).digest()

    def difference(self, other: "Vocabulary") -> str | None:
        """Why a model with the other vocabulary cannot draft for one with this, in a few words."""
        if other.size != self.size:
            return f"{other.size} and {self.size} tokens"
        if self.tokens is None or other.tokens is None or self.digest == other.digest:
            return None
        for token, (mine, its) in enumerate(zip(self.tokens, other.tokens, strict=True)):
            if mine and its and mine != its:
                return f"token {token} is {its!r} and {mine!r}"
        return None


def check_same_vocabulary(target: Vocabulary, draft: Vocabulary) -> None:
    """
    Raises:
        ValueError: an id means something else to the draft than to the target, or to one of them nothing.
    """
    difference = target.difference(draft)
    if difference is not None:
        raise ValueError(
            f"draft and target have different vocabularies ({difference}); a draft must be trained on the same tokens"
        )


def known_vocabulary(model: object) -> Vocabulary:
    """That of a model, or of a drafter that has one; of other drafters the size alone is known."""
    known = getattr(getattr(model, "model", model), "vocabulary", None)
    return known if isinstance(known, Vocabulary) else Vocabulary(model.vocab_size)


def tokens_of(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens of a tokenizer by id."""
    return {token: text for text, token in tokenizer.get_vocab(with_added_tokens=True).items()}


def read_tokens(folder: Path, tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens of a tokenizer by id, with those that ``tokenizer_config.json`` adds to it."""
    tokens = tokens_of(tokenizer)
    path = folder / TOKENIZER_CONFIG
    added = read_json(path).get("added_tokens_decoder") if is_there(path) else None
    for token, entry in (added if isinstance(added, dict) else {}).items():
        if token.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            tokens.setdefault(int(token), entry["content"])
    return tokens


def vocabulary_of(tokens: dict[int, str] | None, stated: int, stored: int, eos: Iterable[int]) -> Vocabulary:
    """The vocabulary of a model with ``stored`` rows of embedding, ``stated`` of which are not padding.

    An id is one that the tokenizer has, or that ends a text; without a tokenizer one below ``stated``.
    """
    if tokens is None or not any(token < stored for token in tokens):
        return Vocabulary(stated)
    known = dict.fromkeys(eos, "") | tokens
    size = 1 + max(token for token in known if token < stored)
    return Vocabulary(size, tuple(known.get(token) for token in range(size)))
