"""Text in, text out: prompts that are text, pieces as they come, log-probabilities."""

import pickle

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.text import byte_fallback_tokenizer

STORY = "It was a fine morning, and"


@pytest.fixture(scope="module")
def target() -> sm.MambaLM:
    return sm.load_model("builtin:target")


@pytest.fixture(scope="module")
def draft() -> sm.MambaLM:
    return sm.load_model("builtin:draft")


def ids(model, text):
    return model.tokenizer.encode(text).ids


def test_texts_are_prompts(target, draft):
    """One or several, of any length; the result has the new text."""
    texts = [STORY, "He"]
    result = sm.generate(target, texts, draft=draft, max_new_tokens=12)
    expected = sm.generate(target, [ids(target, text) for text in texts], max_new_tokens=12)
    assert [row.tolist() for row in result.sequences] == [row.tolist() for row in expected.sequences]
    for row, text in enumerate(texts):
        assert text + result.texts[row] == target.tokenizer.decode(result.sequences[row].tolist())
    assert expected.texts is None
    alone = sm.generate(target, STORY, max_new_tokens=12)
    assert alone.texts == result.texts[:1] and pickle.loads(pickle.dumps(alone)).texts == alone.texts


def test_stop_strings_are_no_part_of_a_text(target):
    whole = sm.generate(target, STORY, max_new_tokens=30).texts[0]
    stop = whole[10:13]
    result = sm.generate(target, [ids(target, STORY)], max_new_tokens=30, stop_strings=[stop])
    assert result.texts == [whole[: whole.index(stop)]] and result.finish_reasons == ["stop"]
    assert sm.generate(target, STORY, max_new_tokens=0).texts == [""]


def test_what_follows_a_text_has_no_bos_and_no_space_before_it():
    """Catches: a second BOS; the space that the tokenizer puts before a text."""
    tokenizer = byte_fallback_tokenizer(["▁a", "b", "▁c"])
    model = TableModel(torch.full((tokenizer.get_vocab_size(),) * 2, 1e-6) + torch.eye(tokenizer.get_vocab_size()))
    model.tokenizer = tokenizer
    cache = sm.GenerationCache()
    sm.generate(model, ["a", "c"], max_new_tokens=1, cache=cache)
    first = [list(text) for text in cache.sequences]
    result = sm.generate(model, ["b", " c"], max_new_tokens=1, cache=cache)
    for row, text in enumerate(("b", " c")):
        added = sm.encode_continuation(tokenizer, text)
        tokens = result.sequences[row].tolist()
        assert tokens[:-1] == first[row] + added and tokens.count(tokenizer.token_to_id("<s>")) == 1
    assert tokenizer.decode(result.sequences[0].tolist()) == "a abb"
    with pytest.raises(ValueError, match="holds 2 rows, but there are 1 prompts"):
        sm.generate(model, "b", max_new_tokens=1, cache=cache)


@pytest.mark.parametrize("stops", [False, True], ids=["to the end", "to a stop string"])
def test_pieces_are_the_text(target, draft, stops):
    options = {"draft": draft, "max_new_tokens": 40, "lookahead": 6}
    if stops:
        options["stop_strings"] = [sm.generate(target, STORY, **options).texts[0][30:34]]
    expected = sm.generate(target, STORY, **options)
    pieces, generator = [], sm.stream(target, STORY, **options)
    try:
        while True:
            pieces.append(next(generator))
    except StopIteration as end:
        result = end.value
    assert "".join(pieces) == expected.texts[0] == result.texts[0] and len(pieces) > 5 and all(pieces)
    assert result.finish_reasons == expected.finish_reasons and result.stats.rounds == expected.stats.rounds
    assert torch.is_grad_enabled()


def test_a_character_of_several_bytes_is_one_piece():
    tokenizer = byte_fallback_tokenizer()
    chain = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€ö".encode()]
    table = torch.full((tokenizer.get_vocab_size(),) * 2, 1e-6)
    start = tokenizer.token_to_id("<0x41>")
    for token, successor in zip([start, *chain], [*chain, start], strict=True):
        table[token, successor] = 1
    model = TableModel(table)
    model.tokenizer = tokenizer
    assert "".join(sm.stream(model, [[start]], max_new_tokens=6)) == "€öA"
    assert [piece for piece in sm.stream(model, [[start]], max_new_tokens=6, draft="ngram") if "\ufffd" in piece] == []


def test_closing_ends_the_decoding(target, draft):
    """The cache has the text up to there, and going on is one longer call."""
    cache, executor = sm.GenerationCache(), sm.EagerExecutor()
    options = {"draft": draft, "cache": cache, "executor": executor}
    shown = ""
    for piece in sm.stream(target, STORY, max_new_tokens=60, **options):
        shown += piece
        if len(shown) > 9:
            break
    assert len(ids(target, STORY)) + 9 < len(cache.sequences[0]) < len(ids(target, STORY)) + 20
    result = sm.generate(target, cache.sequences, max_new_tokens=7, **options)
    length = len(result.sequences[0]) - len(ids(target, STORY))
    expected = sm.generate(target, STORY, max_new_tokens=length)
    assert result.sequences[0].tolist() == expected.sequences[0].tolist() and expected.texts[0].startswith(shown)


def test_what_stream_refuses_it_refuses_at_once(target):
    for options, message in (
        ({"prompt": [[1], [2]]}, "stream takes one prompt, got 2"),
        ({"prompt": STORY, "max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt": ""}, "empty"),
        ({"prompt": STORY, "logprobs": 21}, "logprobs must be None or from 0 to 20, got 21"),
    ):
        with pytest.raises(ValueError, match=message):
            sm.stream(target, **options)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        sm.stream(TableModel(torch.eye(4)), [[0]])


@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_log_probabilities(target, draft, acceptance):
    """The target's own, before temperature and filters, with a draft as without."""
    sampling = sm.SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.2, seed=2)
    options = {"sampling": sampling, "acceptance": acceptance, "draft": draft, "max_new_tokens": 14}
    result = sm.generate(target, [STORY, "He"], logprobs=3, **options)
    exact = sm.generate(target, [STORY, "He"], output_logits=True, **options)
    assert result.logits is None and exact.logprobs is None
    for row, (logits, known) in enumerate(zip(exact.logits, result.logprobs, strict=True)):
        assert result.sequences[row].tolist() == exact.sequences[row].tolist()
        new, logprobs = result.sequences[row][-len(known) :], logits.double().log_softmax(-1)
        assert len(known) == 14
        for at, one in enumerate(known):
            assert one.logprob == pytest.approx(logprobs[at, new[at]].item(), abs=1e-5)
            values, tokens = logprobs[at].topk(3)
            assert [token for token, _ in one.top] == tokens.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)
    both = sm.generate(target, [STORY, "He"], logprobs=0, output_logits=True, **options)
    assert [[one.logprob for one in row] for row in both.logprobs] == [
        [one.logprob for one in row] for row in result.logprobs
    ]
    assert len(both.logits[0]) == 14 and both.logprobs[0][0].top == ()
