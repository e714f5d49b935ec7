"""Tokenizers: read from a checkpoint, and asked for the ids of a text."""

import copy
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from ..ops.values import reason
from .files import check_regular, is_there

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
_ANCHOR = "\n"  # a text of its own to every tokenizer, unless what follows begins with line ends


def load_tokenizer(folder: Path, fall_back: bool, download: Callable[[str, list[str]], Path]) -> Tokenizer | None:
    """The tokenizer of a checkpoint: ``tokenizer.json`` in its folder; with ``fall_back`` else gpt-neox-20b's.

    download: gives the folder of a hub id's files of these patterns. None when there is no tokenizer.

    Raises:
        ValueError: the file is broken, or the fall-back cannot be downloaded.
    """
    path = folder / "tokenizer.json"
    if not is_there(path):
        if not fall_back:
            return None
        try:
            path = download(DEFAULT_TOKENIZER, ["tokenizer.json"]) / "tokenizer.json"
        except ValueError as error:
            raise ValueError(f"{folder} has no tokenizer.json, and text needs one: {error}") from None
    return read_tokenizer(path)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer file, without what its training left behind.

    Raises:
        ValueError: the file is broken.
    """
    check_regular(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer file: {reason(error)}") from None
    return _clean(tokenizer)


def clean_copy(tokenizer: object) -> Tokenizer:
    """A copy of what ``as_tokenizer`` takes, without what earlier calls left behind.

    Raises:
        ValueError: it is no tokenizer.
    """
    return _clean(copy.deepcopy(as_tokenizer(tokenizer)))


def _clean(tokenizer: Tokenizer) -> Tokenizer:
    """Without truncation, padding, and merges left out at random."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # BPE alone has it
        tokenizer.model.dropout = None
    return tokenizer


def tokenizer_of(model: object) -> Tokenizer | None:
    """The tokenizer of a model, if it has one.

    Raises:
        ValueError: its file is broken or out of reach.
    """
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else as_tokenizer(tokenizer)


def text_tokenizer(model: object) -> Tokenizer:
    """The tokenizer of a model that is given text.

    Raises:
        ValueError: it has none, or its file is broken or out of reach.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        name = getattr(model, "name", "the model")
        raise ValueError(
            f"{name} has no tokenizer; put tokenizer.json into its folder (state-spaces models use that of "
            f"{DEFAULT_TOKENIZER}), or pass token ids from Python"
        )
    return tokenizer


def as_tokenizer(tokenizer: object) -> Tokenizer:
    """The ``tokenizers.Tokenizer`` in what a caller has: that itself, or a fast tokenizer of transformers.

    Raises:
        ValueError: it is neither.
    """
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(inner, Tokenizer):
        return inner
    raise ValueError(
        f"a tokenizer must be a tokenizers.Tokenizer or a fast one of transformers, got {type(tokenizer).__name__}; "
        "Tokenizer.from_file reads a tokenizer.json"
    )


def encode(tokenizer: Tokenizer, text: str, special_tokens: bool = True) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds around one unless told otherwise.

    Raises:
        ValueError: the text holds half of a surrogate pair, which no tokenizer can read.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: character {error.start} is {text[error.start]!r}") from None
    return tokenizer.encode(text, add_special_tokens=special_tokens).ids


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that follows other text: nothing is put before it, neither a special token nor a space."""
    anchor, ids = encode(tokenizer, _ANCHOR, False), encode(tokenizer, _ANCHOR + text, False)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(tokenizer, text, False)


def added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that ``encode`` puts before a text and behind it."""
    inner, whole = encode(tokenizer, "a", False), encode(tokenizer, "a")
    count = len(whole) - len(inner)
    before = next((at for at in range(count + 1) if whole[at : at + len(inner)] == inner), 0)
    return whole[:before], whole[before + len(inner) :]
