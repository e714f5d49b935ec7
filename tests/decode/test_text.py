"""Text as it grows equals decoding all tokens at once, for every kind of tokenizer, and costs the same per token."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_mamba as sm
from speculative_mamba.models import detokenizer
from speculative_mamba.models.text import TextStream
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.text import byte_fallback_tokenizer, byte_level_tokenizer, word_piece_tokenizer

WORDS = ["▁", "▁world", "▁Hello", "lo", "\ufffd"]
TOKENIZERS = {
    "byte-fallback": byte_fallback_tokenizer(WORDS),
    "byte-level": byte_level_tokenizer(["<|im_end|>"]),
    "word-piece": word_piece_tokenizer(),
}
FALLBACK, BYTES = TOKENIZERS["byte-fallback"], TOKENIZERS["byte-level"]
# The tokens of a line end, of the parts of € and ö, and of words and a special token between them.
FEW = ["<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "<0xC3>", "<0xB6>", "▁world", "▁", "</s>"]


def ids(tokenizer, *names):
    return [tokenizer.token_to_id(name) for name in names]


def streamed(tokenizer, tokens, *arguments, **options):
    stream = TextStream(tokenizer, *arguments, **options)
    pieces = [stream.push(token) for token in tokens]
    return "".join(pieces) + stream.finish()


@pytest.mark.parametrize("skip", [True, False], ids=["specials hidden", "specials shown"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_are_the_whole(kind, skip, data):
    tokenizer = TOKENIZERS[kind]
    alphabet = st.integers(0, tokenizer.get_vocab_size() - 1)
    if kind == "byte-fallback" and data.draw(st.booleans()):
        alphabet = st.sampled_from(ids(tokenizer, *FEW))
    tokens = data.draw(st.lists(alphabet, max_size=40))
    options = {"skip_special_tokens": skip}
    assert streamed(tokenizer, tokens, **options) == tokenizer.decode(tokens, **options)
    # Behind a prompt, unless a run of bytes goes on across its end: what it is part of is the prompt's affair.
    start = data.draw(st.integers(0, len(tokens)))
    before, whole = (tokenizer.decode(part, **options) for part in (tokens[:start], tokens))
    if start and not tokenizer.id_to_token(tokens[start - 1]).startswith("<") and whole.startswith(before):
        assert before + streamed(tokenizer, tokens[start:], (), tokens[:start], **options) == whole


def test_what_decode_stream_raises_on():
    tokens = ids(FALLBACK, "<0x0A>", "<0xE2>", "▁world")
    assert streamed(FALLBACK, tokens) == FALLBACK.decode(tokens) == "\ufffd\ufffd world"


@pytest.mark.parametrize("names", [["<0xE2>", "<0x82>"], ["<0xFF>"] * 3, ["▁world", "<0x0A>"], ["<0x0A>", "<0xE2>"]])
def test_an_end_within_bytes_loses_none(names):
    tokens = ids(FALLBACK, *names)
    assert streamed(FALLBACK, tokens) == FALLBACK.decode(tokens)


def test_the_first_word_keeps_its_space():
    prompt, tokens = ids(FALLBACK, "<s>", "▁Hello"), ids(FALLBACK, "▁world")
    assert streamed(FALLBACK, tokens, (), prompt) == " world"
    assert streamed(FALLBACK, tokens, [" world"], prompt) == ""
    pieces = TOKENIZERS["word-piece"]
    assert streamed(pieces, ids(pieces, "##ing", "world"), (), ids(pieces, "[CLS]", "hello")) == "ing world"


def test_a_character_that_the_prompt_began():
    prompt = ids(FALLBACK, "▁world", "<0xE2>", "<0x82>")
    assert streamed(FALLBACK, ids(FALLBACK, "<0xAC>", "▁world"), (), prompt) == "€ world"
    prompt, rest = BYTES.encode("a€").ids[:3], BYTES.encode("€b").ids[2:]
    assert streamed(BYTES, rest, (), prompt) == "€b"


def test_generate_finds_the_first_word_with_its_space():
    """Through the loop: "Hello" is followed by "▁world" for ever."""
    size = FALLBACK.get_vocab_size()
    (hello,), (world,) = ids(FALLBACK, "▁Hello"), ids(FALLBACK, "▁world")
    table = torch.full((size, size), 1e-6)
    table[:, world] = 1
    model = TableModel(table)
    model.tokenizer = FALLBACK
    result = sm.generate(model, [[hello]], max_new_tokens=5, stop_strings=[" world"])
    assert result.finish_reasons == ["stop"] and result.sequences[0].tolist() == [hello, world]


@pytest.mark.parametrize(
    ("names", "stop", "at", "shown"),
    [
        (["▁world", "</s>", "▁world"], "</s>", 2, " world"),
        (["▁world", "</s>", "▁world"], "d</s> w", 3, " worl"),  # across a hidden token
        (["▁world", "<0x0A>", "<0x0A>", "▁"], "\n\n", 3, " world"),  # at the byte that completes it
        (["▁world", "<0x0A>", "</s>"], "\n</s>", 3, " world"),
        (["<0xE2>", "</s>", "<0x82>", "<0xAC>", "▁"], "€", 4, "</s>"),
        (["▁", "▁", "▁world"], "  world", 3, " "),
    ],
)
@pytest.mark.parametrize("skip", [True, False])
def test_stop_strings_see_special_tokens_and_every_border(names, stop, at, shown, skip):
    if "€" in stop and not skip:
        return  # a special token that is shown parts the bytes
    stream = TextStream(FALLBACK, [stop], ids(FALLBACK, "▁Hello"), skip_special_tokens=skip)
    pieces, count = [], 0
    for token in ids(FALLBACK, *names):
        pieces.append(stream.push(token))
        count += 1
        if stream.stopped:
            break
    assert stream.stopped and count == at, "the token that completes it"
    assert "".join(pieces) + stream.finish() == (shown.replace("</s>", "") if skip else shown)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_text_ends_before_the_first_stop_string(data):
    """Against cutting the whole text, at the first token whose whole text holds a stop string."""
    tokens = data.draw(st.lists(st.sampled_from(ids(FALLBACK, "▁world", "▁", "lo", "<0x0A>", "<0x6C>")), max_size=12))
    stops = data.draw(st.lists(st.sampled_from(["lo", "o w", "\n", "d\nl", "ll", "  "]), min_size=1, max_size=3))
    prompt = ids(FALLBACK, "▁Hello")
    texts = [FALLBACK.decode(prompt + tokens[: n + 1]).removeprefix("Hello") for n in range(len(tokens))]
    ended = next((n for n, text in enumerate(texts) if any(stop in text for stop in stops)), None)
    stream = TextStream(FALLBACK, stops, prompt)
    pieces = []
    for at, token in enumerate(tokens):
        pieces.append(stream.push(token))
        assert stream.stopped == (ended is not None and at >= ended)
    text = "" if not texts else texts[-1 if ended is None else ended]
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert "".join(pieces) + stream.finish() == text[:cut]


@pytest.mark.parametrize("name", ["<0x0A>", "<0xFF>", "<0xE2>", "\ufffd", "▁world", "</s>"])
def test_a_token_costs_the_same_however_long_the_text_is(name, monkeypatch):
    """Counted in tokens decoded, over 400 of one kind."""
    decoded = 0
    decode = detokenizer.Detokenizer._decode

    def counted(self, tokens):
        nonlocal decoded
        decoded += len(tokens)
        return decode(self, tokens)

    monkeypatch.setattr(detokenizer.Detokenizer, "_decode", counted)
    stream = TextStream(FALLBACK, ["zz"], ids(FALLBACK, "▁Hello"))
    costs = []
    for _ in range(4):
        decoded = 0
        for token in ids(FALLBACK, name) * 100:
            stream.push(token)
        costs.append(decoded)
    assert costs[-1] <= 1.5 * costs[1] + 8 and costs[-1] < 100 * 2 * detokenizer.MAX_RUN


def test_long_runs_of_bytes_are_shown_before_they_end():
    tokens = [token for byte in "€".encode() for token in ids(FALLBACK, f"<0x{byte:02X}>")] * 100
    stream = TextStream(FALLBACK, (), ids(FALLBACK, "▁Hello"))
    shown = "".join(stream.push(token) for token in tokens)
    assert len(shown) >= 70 and shown + stream.finish() == "€" * 100


def test_ids_that_no_tokenizer_has_are_no_text():
    assert streamed(FALLBACK, [FALLBACK.token_to_id("lo"), 10_000, FALLBACK.token_to_id("lo")]) == "lolo"


def test_tokenizers_of_transformers():
    from transformers import PreTrainedTokenizerFast

    tokens = ids(FALLBACK, "▁Hello", "▁world")
    assert streamed(PreTrainedTokenizerFast(tokenizer_object=FALLBACK), tokens) == "Hello world"


@pytest.mark.parametrize("wrong", [object(), "tokenizer.json", lambda text: [1]], ids=["object", "str", "function"])
def test_what_is_no_tokenizer_is_one_line_before_anything_runs(wrong):
    model = TableModel(torch.eye(4).roll(1, 1))
    model.tokenizer = wrong
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizers.Tokenizer") as error:
        sm.generate(model, [[0]], stop_strings=["x"])
    assert "\n" not in str(error.value)


def test_random_sequences_of_few_tokens_never_raise():
    draw = random.Random(0)
    for _ in range(400):
        tokens = [draw.choice(ids(FALLBACK, *FEW)) for _ in range(8)]
        assert streamed(FALLBACK, tokens) == FALLBACK.decode(tokens)
