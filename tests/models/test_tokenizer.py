"""Tokenizer files: nothing that their training left behind changes a text."""

import json

import pytest
from tokenizers import Tokenizer, models, processors

from speculative_mamba.models.tokenizer import (
    added_around,
    as_tokenizer,
    encode,
    encode_continuation,
    load_tokenizer,
    read_tokenizer,
)
from speculative_mamba.testing.text import byte_fallback_tokenizer, byte_level_tokenizer

TEXT = "a prompt that is longer than eight tokens"


def no_download(*_):
    raise AssertionError("nothing is to be downloaded")


@pytest.mark.parametrize("setting", ["truncation", "truncation left", "padding", "padding left", "all"])
def test_settings_of_batches_are_dropped(setting, tmp_path):
    tokenizer = byte_level_tokenizer(["<pad>"])
    whole = tokenizer.encode(TEXT).ids
    if setting in ("truncation", "all"):
        tokenizer.enable_truncation(8)
    if setting == "truncation left":
        tokenizer.enable_truncation(8, direction="left")
    if setting in ("padding", "all"):
        tokenizer.enable_padding(length=64, pad_token="<pad>", pad_id=256)
    if setting == "padding left":
        tokenizer.enable_padding(direction="left", pad_to_multiple_of=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, False, no_download).encode(TEXT).ids == whole


def test_merges_are_not_left_out_at_random(tmp_path):
    vocabulary = {name: token for token, name in enumerate(["a", "b", "ab", "abab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "ab")], dropout=0.9))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path / "tokenizer.json")
    assert [read.encode("abab").ids for _ in range(20)] == [[3]] * 20


def test_a_broken_file_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file") as error:
        load_tokenizer(tmp_path, False, no_download)
    assert "\n" not in str(error.value)


def test_without_a_file(tmp_path):
    assert load_tokenizer(tmp_path, False, no_download) is None
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert load_tokenizer(empty, True, lambda *_: tmp_path).encode("a").ids == byte_level_tokenizer().encode("a").ids


def test_special_tokens_around_a_text():
    tokenizer = byte_fallback_tokenizer()
    assert encode(tokenizer, "Hi") == [1, *encode(tokenizer, "Hi", False)]
    assert added_around(tokenizer) == ([1], [])
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.post_processor = both
    assert added_around(tokenizer) == ([1], [2])
    assert added_around(byte_level_tokenizer()) == ([], [])


@pytest.mark.parametrize("text", [" And then", "And", "\nAnd", "", "é", "  "])
def test_a_continuation_is_the_text_alone(text):
    """Behind any beginning the tokens decode to beginning and text: no BOS, and no space that a normalizer puts."""
    for tokenizer in (byte_fallback_tokenizer(["▁"]), byte_level_tokenizer()):
        beginning = encode(tokenizer, "Once.")
        ids = encode_continuation(tokenizer, text)
        assert tokenizer.decode(beginning + ids) == "Once." + text and 1 not in ids[:1]


def test_half_a_surrogate_pair_is_one_line():
    with pytest.raises(ValueError, match="not valid Unicode: character 1"):
        encode(byte_level_tokenizer(), "a\udce9")


def test_what_is_taken_for_a_tokenizer():
    tokenizer = byte_level_tokenizer()
    assert as_tokenizer(tokenizer) is tokenizer
    with pytest.raises(ValueError, match="got NoneType"):
        as_tokenizer(None)
