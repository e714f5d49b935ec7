"""Reads prompts in every form that leaves no doubt, without the padding that others put around them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Encoding

from ..ops.values import is_int, shown
from .tokenizer import encode, encode_continuation, text_tokenizer, tokenizer_of
from .vocabulary import Vocabulary, known_vocabulary

# Names by which vocabularies call the token that stands for nothing.
_PADS = ("<pad>", "[PAD]", "<PAD>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_FORMS = "prompts must be texts, a LongTensor (B, L), a list of lists of token ids, or what a tokenizer returns"


def encode_texts(prompts: object, known: Sequence[list[int]], target: object) -> tuple[object, bool]:
    """A text or a list of texts as token ids, and whether it was that; anything else as it is.

    known: the rows' token ids so far, which the texts follow; none where they begin.

    Raises:
        ValueError: the target has no tokenizer, or a text is none.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    is_list = isinstance(texts, list | tuple) and len(texts) > 0
    if not is_list or not all(isinstance(text, str) for text in texts):
        return prompts, False
    tokenizer = text_tokenizer(target)
    if not known:
        return [encode(tokenizer, text) for text in texts], True
    if len(known) != len(texts):
        raise ValueError(f"the cache holds {len(known)} rows, but there are {len(texts)} prompts")
    return [ids + encode_continuation(tokenizer, text) for ids, text in zip(known, texts, strict=True)], True


def read_prompts(
    prompt_ids: object, attention_mask: object, target: object, *, may_be_padded: bool = True
) -> list[list[int]]:
    """Prompts as lists of token ids.

    prompt_ids: as ``generate`` says. attention_mask: of the same shape, 0 where there is padding; None: there is none,
    and with ``may_be_padded`` rows that look as if there were are refused.

    Raises:
        ValueError: no rows, an empty row, a row that looks padded, or other things than token ids of the vocabulary.
    """
    if isinstance(prompt_ids, Encoding) or (isinstance(prompt_ids, Mapping) and _is_flat(prompt_ids.get("input_ids"))):
        prompt_ids = [prompt_ids]
    if isinstance(prompt_ids, Mapping):
        prompt_ids, attention_mask = _parts(prompt_ids, attention_mask)
    whole_and_rows = [prompt_ids, *prompt_ids] if isinstance(prompt_ids, list | tuple) else [prompt_ids]
    if any(isinstance(part, str | bytes) for part in whole_and_rows):
        raise ValueError(
            f"{_FORMS}, got text beside or within them; encode it first: [target.tokenizer.encode(text).ids]"
        )
    is_tensor = isinstance(prompt_ids, torch.Tensor)
    if is_tensor and (prompt_ids.ndim != 2 or prompt_ids.is_floating_point() or prompt_ids.dtype == torch.bool):
        raise ValueError(
            f"prompts must be a LongTensor (B, L), got {prompt_ids.dtype} of shape {tuple(prompt_ids.shape)}"
        )
    rows = _lists(prompt_ids, _FORMS)
    if not rows:
        raise ValueError("prompts have no rows; give at least one prompt")
    masks = [None] * len(rows)
    if attention_mask is not None:
        masks = _lists(attention_mask, "attention_mask must have the shape of prompts")
        if len(masks) != len(rows):
            raise ValueError(f"attention_mask has {len(masks)} rows, but there are {len(rows)} prompts")
    pairs = enumerate(zip(rows, masks, strict=True))
    prompts = [_row(index, row, mask, known_vocabulary(target)) for index, (row, mask) in pairs]
    if attention_mask is None and may_be_padded and len(set(map(len, prompts))) == 1:
        _refuse_padding(prompts, target, is_tensor or isinstance(prompt_ids, np.ndarray))
    return prompts


def _is_flat(ids: object) -> bool:
    """Whether these are the ids of a single text."""
    return isinstance(ids, Sequence) and bool(ids) and all(map(is_int, ids))


def _parts(encoded: Mapping, attention_mask: object) -> tuple[object, object]:
    """Ids and mask of what a tokenizer of transformers returned."""
    if "input_ids" not in encoded:
        raise ValueError(f"{_FORMS}, got a {type(encoded).__name__} without input_ids")
    own = encoded.get("attention_mask")
    if own is not None and attention_mask is not None:
        raise ValueError("attention_mask is given twice; the prompts hold one already")
    return encoded["input_ids"], attention_mask if own is None else own


def _lists(values: object, expected: str) -> list:
    """The rows of a tensor, an array or a list; a row may be a tensor, an array, an encoding or a list."""
    try:
        return [_list(row) for row in (values.tolist() if isinstance(values, torch.Tensor) else values)]
    except TypeError:
        raise ValueError(expected) from None


def _list(row: object) -> object:
    if isinstance(row, Encoding | Mapping):
        return row
    return list(row.tolist() if isinstance(row, torch.Tensor) else row)


def _row(index: int, row: object, mask: object, vocabulary: Vocabulary) -> list[int]:
    if isinstance(row, Encoding):
        row, mask = row.ids, row.attention_mask if mask is None else mask
    elif isinstance(row, Mapping):
        row, mask = _parts(row, mask)
        [row] = _lists([row], _FORMS)
    if mask is not None:
        row = _unpadded(index, row, list(mask))
    if not row:
        raise ValueError(f"the prompt of row {index} is empty; give at least one token")
    for token in row:
        if not is_int(token):
            raise ValueError(f"the prompt of row {index} holds {shown(token)}, which is no token id")
        if not 0 <= token < vocabulary.size:
            raise ValueError(
                f"token id {shown(token)} in row {index} is outside the vocabulary of {vocabulary.size} tokens"
            )
        if token in vocabulary.unused:
            raise ValueError(f"token id {token} in row {index} is padding: the model's tokenizer has no such token")
    return list(map(int, row))


def _unpadded(index: int, row: list, mask: list) -> list:
    if len(mask) != len(row):
        raise ValueError(f"attention_mask of row {index} has {len(mask)} entries for {len(row)} tokens")
    if not all(kept in (0, 1) for kept in mask):
        raise ValueError(f"attention_mask of row {index} must hold 0 and 1 alone, got {mask}")
    kept = [at for at, one in enumerate(mask) if one]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError(f"attention_mask of row {index} leaves out tokens in the middle of the text")
    return [row[at] for at in kept]


def _refuse_padding(prompts: list[list[int]], target: object, is_array: bool) -> None:
    """Rows of one length are padded if they begin or end with the pad token, or if they do so with another special
    token, which often stands in for it: several times and more than other rows, or in an array one of the two."""
    pads, specials = special_tokens(target)
    for token in pads | (specials if is_array or len(prompts) > 1 else set()):
        for end, step in (("begins", 1), ("ends", -1)):
            runs = [next((n for n, t in enumerate(row[::step]) if t != token), len(row)) for row in prompts]
            usual = max(min(runs), 1)
            if is_array:
                usual = min(runs) if min(runs) < max(runs) else 1
            if max(runs) > (0 if token in pads else usual):
                row = runs.index(max(runs))
                raise ValueError(
                    f"the prompts look padded: row {row} {end} with {runs[row]} times token {token}, which stands for "
                    "nothing or ends texts; pass the tokenizer's attention_mask too (ones, if these are text)"
                )


def special_tokens(target: object) -> tuple[set[int], set[int]]:
    """Ids that stand for padding, and of all special tokens, as far as the target's tokenizer is at hand."""
    eos = target.eos_token_id
    specials = set() if eos is None else set(eos) if isinstance(eos, tuple) else {eos}
    try:
        tokenizer = tokenizer_of(target)
    except ValueError:  # broken or out of reach; ids need none
        tokenizer = None
    if tokenizer is None:
        return set(), specials
    named = {tokenizer.token_to_id(name) for name in _PADS} - {None}
    if tokenizer.padding is not None:
        named.add(tokenizer.padding["pad_id"])
    return named, specials | {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
