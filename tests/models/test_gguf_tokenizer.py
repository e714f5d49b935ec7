"""Tokenizers made from the metadata of GGUF files: the ids and the text of the tokenizer that was converted."""

import functools
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from speculative_mamba.models.chat import ChatTemplate
from speculative_mamba.models.gguf.tokenizer import GgufVocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = [
    "The cat sat on the mat, and then it didn't sit any more; they'd WE'LL I'm.",
    "Zahlen: 1234567 90 3.14 und 2026-11-29;  zwei   Leerzeichen\tund Tab\r\n\r\nneue Zeile \n  eingerückt ",
    "Ĝis la revido! Čeština, ελληνικά, русский, 中文字符, 日本語テキスト, 한국어 e\u0301 é ﬁ ½ ²",
    "def f(x):\n    return {'a': [x**2, -1]}  # ¿qué? «ja» … — 🙂👩‍👩‍👧 \u200b\x00 end",
    " leading", "trailing ", "", " ", "\n", "<|end|>", "a<|end|> b", "    deep    indent",
    "don'T CamelCaseWords HTTPServer",
]  # fmt: skip
# What published tokenizer.json files have before byte-pair encoding.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
FALCON = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        GPT2,
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)


def by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


KINDS: dict[str, tuple[pre_tokenizers.PreTokenizer, bool, bool]] = {  # what splits, whether NFC, whether a BOS is added
    "gpt-2": (GPT2, False, False),
    "olmo": (GPT2, True, False),
    "mpt": (GPT2, True, False),
    "llama-bpe": (by_pattern(LLAMA3), False, True),
    "falcon-h1": (by_pattern(LLAMA3), False, True),
    "lfm2": (by_pattern(LLAMA3), False, True),
    "dbrx": (by_pattern(LLAMA3), False, False),
    "refact": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False, False),
    "qwen2": (by_pattern(QWEN2), True, False),
    "pixtral": (by_pattern(TEKKEN), False, True),
    "falcon": (FALCON, False, False),
}


def texts() -> list[str]:
    """Those above, and random mixtures of their parts."""
    rng, parts = random.Random(0), [part for text in TEXTS for part in (text[:7], text[7:12], text[-9:])]
    return TEXTS + ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(60)]


@functools.cache
def trained(name: str) -> Tokenizer:
    split, nfc, adds_bos = KINDS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=adds_bos))
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("  ", normalized=False)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    return tokenizer


def metadata(tokenizer: Tokenizer, pre: str, padding: int = 0) -> dict[str, Any]:
    """As llama.cpp's conversion writes it."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED for i in range(len(tokens))]
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(padding)],
        "tokenizer.ggml.token_type": types + [UNUSED] * padding,
        "tokenizer.ggml.bos_token_id": vocabulary["<|begin|>"], "tokenizer.ggml.eos_token_id": vocabulary["<|end|>"],
    }  # fmt: skip


def vocabulary(values: dict[str, Any]) -> GgufVocabulary:
    return GgufVocabulary(Path("model.gguf"), values)


@pytest.mark.parametrize("name", KINDS)
def test_byte_level_ids_and_texts_are_those_of_the_original(name: str) -> None:
    original, made = trained(name), vocabulary(metadata(trained(name), name, padding=3)).tokenizer()
    for text in texts():
        expected = original.encode(text).ids
        assert made.encode(text).ids == expected, text
        for skip in (True, False):
            assert made.decode(expected, skip_special_tokens=skip) == original.decode(
                expected, skip_special_tokens=skip
            )
    assert made.get_vocab_size() == original.get_vocab_size(), "padding is no token"


def test_kinds_differ_on_these_texts() -> None:
    """So that a pattern in the place of another is noticed."""
    cuts = {}
    for name, (split, nfc, _) in KINDS.items():
        normal = normalizers.NFC().normalize_str if nfc else str
        cuts[name] = str([[piece for piece, _ in split.pre_tokenize_str(normal(text))] for text in texts()])
    same = {("olmo", "mpt"), ("llama-bpe", "falcon-h1"), ("llama-bpe", "lfm2"), ("falcon-h1", "lfm2")}
    same |= {(name, "dbrx") for name in ("llama-bpe", "falcon-h1", "lfm2")}
    equal = {(a, b) for a in cuts for b in cuts if list(cuts).index(a) < list(cuts).index(b) and cuts[a] == cuts[b]}
    assert equal == same


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_special_tokens_around_a_text_are_those_that_the_file_states(adds_bos: bool, adds_eos: bool) -> None:
    values = metadata(trained("llama-bpe"), "llama-bpe")
    values |= {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}
    made = vocabulary(values).tokenizer()
    inner = made.encode("cat", add_special_tokens=False).ids
    begin, end = (values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    assert made.encode("cat").ids == [begin] * adds_bos + inner + [end] * adds_eos


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "c", "a", "s", "o",
    "n", "th", "he", "▁t", "the", "▁the", "▁th", "ca", "at", "cat", "▁c", "▁ca", "ts", "tse", "on", "▁▁", "ese", "e▁",
    "es", "se", "é", "<|end|>"]  # fmt: skip


def sentence_piece(**changes: Any) -> dict[str, Any]:
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(PIECES) - 260), USER_DEFINED]
    scores = random.Random(1).sample([-float(rank) for rank in range(1, len(PIECES) + 1)], len(PIECES))
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    } | changes  # fmt: skip


def merged_by_score(text: str, values: dict[str, Any]) -> list[int]:
    """SentencePiece's algorithm as it is described: always the neighbours that make the token of the best score."""
    scores = dict(zip(PIECES, values["tokenizer.ggml.scores"], strict=True))
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    spelled = [[s] if s in PIECES else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [PIECES.index(piece) for pieces in spelled for piece in pieces]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_merges_by_score_and_spells_in_bytes(prefix: bool) -> None:
    values = sentence_piece(**{"tokenizer.ggml.add_space_prefix": prefix})
    made, rng = vocabulary(values).tokenizer(), random.Random(2)
    for text in ["the cats on thé   cat", "ß🙂", *("".join(rng.choices("thecason  éx", k=12)) for _ in range(200))]:
        ids = made.encode(text).ids
        assert ids == [1, *merged_by_score(" " * prefix + text, values)], text
        assert made.decode(ids) == text


def test_types_of_tokens() -> None:
    made = vocabulary(sentence_piece()).tokenizer()
    assert PIECES.index("<|end|>") in made.encode("cat<|end|>").ids
    assert made.encode("cat</s>").ids[-1] == 2 and made.decode([1, PIECES.index("cat"), 2]) == "cat"
    assert made.decode([PIECES.index("<|end|>")]) == "<|end|>", "what a user defined is text"


def test_ends_of_texts() -> None:
    values = metadata(trained("llama-bpe"), "llama-bpe")
    end = values["tokenizer.ggml.eos_token_id"]
    assert vocabulary(values).end_ids() == (end,)
    assert vocabulary(values | {"tokenizer.ggml.eot_token_id": 5}).end_ids() == (end, 5)
    tokens = ["<|eot_id|>" if text == "<|begin|>" else text for text in values["tokenizer.ggml.tokens"]]
    assert vocabulary(values | {"tokenizer.ggml.tokens": tokens}).end_ids() == (
        end,
        values["tokenizer.ggml.bos_token_id"],
    )
    beyond = vocabulary(values | {"tokenizer.ggml.eos_token_id": 2**32 - 1})
    assert beyond.end_ids() == (end,), "an id that is no token stands for none, but the name ends a turn"


def test_chat_templates() -> None:
    values = sentence_piece() | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    template = vocabulary(values | {"tokenizer.chat_template.tool_use": "tools"}).chat_template()
    assert isinstance(template, ChatTemplate)
    message = [{"role": "user", "content": "hi"}]
    assert template.render(message) == "<s>hi" and template.render(message, tools=[{}]) == "tools"
    assert vocabulary(sentence_piece()).chat_template() is None
    with pytest.raises(ValueError, match=r"model.gguf: tokenizer.chat_template must be a text"):
        vocabulary(sentence_piece() | {"tokenizer.chat_template": 3}).chat_template()


BYTES = metadata(trained("gpt-2"), "gpt-2")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BYTES | {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        (BYTES | {"tokenizer.ggml.model": 3}, "tokenizer.ggml.model 3 is not supported"),
        (BYTES | {"tokenizer.ggml.pre": "kimi-k2"}, "tokenizer.ggml.pre 'kimi-k2' is not supported"),
        (BYTES | {"tokenizer.ggml.pre": ["gpt-2"]}, "tokenizer.ggml.pre .* is not supported"),
        ({key: value for key, value in BYTES.items() if key != "tokenizer.ggml.pre"}, "pre None is not supported"),
        (BYTES | {"tokenizer.ggml.merges": ["ab"]}, "merges must be pairs"),
        (BYTES | {"tokenizer.ggml.merges": ["qq ww"]}, "its tokenizer is broken"),
        (BYTES | {"tokenizer.ggml.merges": 3}, "merges must be a list of str"),
        (BYTES | {"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1; true or false is needed"),
        (BYTES | {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "0 and 1 are both 'a'"),
        (sentence_piece(**{"tokenizer.ggml.scores": [-1000.0] * len(PIECES)}), "the order of merges is lost"),
        (sentence_piece(**{"tokenizer.ggml.scores": [0.5]}), "scores has 1 entries for"),
        (sentence_piece(**{"tokenizer.ggml.scores": None}), "scores must be a list of float"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        vocabulary(values).tokenizer()
    assert str(caught.value).startswith("model.gguf: ") and "ids can be used without text" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert vocabulary(values).tokens() is not None


@pytest.mark.parametrize(
    "values",
    [
        {"tokens": 3},
        {"tokens": ["a"], "token_type": ["a"]},
        {"tokens": ["a"], "token_type": [1, 1]},
        {"eos_token_id": "a"},
        {"eos_token_id": -1},
    ],
)
def test_tokens_of_the_wrong_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model.gguf: tokenizer.ggml"):
        made = vocabulary({f"tokenizer.ggml.{name}": value for name, value in values.items()})
        made.end_ids()
        made.tokens()


def test_a_file_without_tokens_has_no_tokenizer() -> None:
    assert vocabulary({"tokenizer.ggml.model": "none"}).tokenizer() is None
    assert vocabulary({}).tokens() is None
