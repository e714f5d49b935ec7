"""Bad arguments of generate: one line that names the value, before anything runs."""

import copy

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import speculative_mamba as sm
from speculative_mamba.testing.models import ARCHITECTURES, TableModel, random_model, tiny_architecture, tiny_config
from speculative_mamba.testing.recording import RecordingExecutor
from speculative_mamba.testing.scripted import ScriptedDraft


def refuse(*words, call):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], ["no rows"]),
        ([[]], ["row 0", "empty"]),
        ([[1], []], ["row 1", "empty"]),
        (torch.zeros(2, 0, dtype=torch.long), ["row 0", "empty"]),
        (torch.zeros(3, dtype=torch.long), ["(B, L)"]),
        (torch.zeros(1, 3), ["float"]),
        ([[1], [2, 61]], ["61", "row 1", "vocabulary"]),
        ([[-1]], ["-1", "vocabulary"]),
        ([[10**12]], ["vocabulary"]),
        ([[1.5]], ["1.5"]),
        ([[True]], ["True"]),
        ([["a"]], ["'a'"]),
        ([[None]], ["None"]),
        ([[[1]]], ["[1]"]),
        ([[float("nan")]], ["nan"]),
        ([1, 2, 3], ["list of lists"]),
        (7, ["list of lists"]),
        (None, ["list of lists"]),
        ([[1], None], ["list of lists"]),
        ("abc", ["no tokenizer"]),
        (["abc", "d"], ["no tokenizer"]),
        ([[1], "abc"], ["text", "tokenizer.encode"]),
        (([1], b"abc"), ["text", "tokenizer.encode"]),
        ([torch.tensor(1)], ["list of lists"]),
        ([torch.tensor([[1]])], ["[1]"]),
        ([torch.tensor([1.0])], ["1.0"]),
        (torch.ones(1, 2, dtype=torch.bool), ["bool"]),
        (torch.ones(1, 2, 3, dtype=torch.long), ["(1, 2, 3)"]),
    ],
    ids=str,
)
def test_prompts(pair, prompts, words):
    refuse(*words, call=lambda: sm.generate(pair().target, prompts))


NAN, INFINITE = float("nan"), float("inf")
NO_NUMBERS = (True, "1", None, [1], NAN, INFINITE, -INFINITE, 1j)
NO_WHOLE_NUMBERS = (2.0, 2.5, True, "3", None, [3], NAN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *[({"lookahead": k}, ["lookahead", k, "1 to 15"]) for k in (0, -1, 16, 1000, *NO_WHOLE_NUMBERS)],
        *[({"max_new_tokens": n}, ["max_new_tokens", n]) for n in (-1, 2**31, *NO_WHOLE_NUMBERS)],
        *[({"acceptance": a}, ["acceptance", a, "rejection, coupled"]) for a in ("always", "", 1, None, ["coupled"])],
        *[({"sampling": s}, ["SamplingParams", s]) for s in ({"temperature": 1}, {}, 0.8, False, "greedy", ())],
        ({"sampling": sm.SamplingParams}, ["SamplingParams"]),
        *[({"stop_token_ids": s}, ["stop_token_ids"]) for s in ("12", ["1"], [1.0], 1, [1, None], [True], [[1]])],
        *[({"stop_token_ids": [3, s]}, ["stop_token_ids", "0 to 60", s]) for s in (61, 10**9, -1)],
        ({"stop_strings": "abc"}, ["stop_strings", "abc"]),
        *[({"stop_strings": ["a", s]}, ["stop_strings", "surrogate"]) for s in ("b\ud83d", "\ude00")],
        *[({"stop_strings": s}, ["stop_strings"]) for s in ([""], ["a", ""], [3], [None], 3, None, True, [b"a"])],
        ({"stop_strings": ["x"]}, ["tokenizer"]),
        *[({name: c}, [name]) for name in ("on_token", "on_commit") for c in (1, "print", [], True)],
        *[({"logits_processor": c}, ["logits_processor"]) for c in (1, "softmax", [], torch.zeros(61))],
        *[({"cache": c}, ["cache", "GenerationCache"]) for c in ([], {}, 1, "cache", sm.GenerationCache, False)],
    ],
    ids=lambda value: str(value)[:60],
)
def test_options(pair, options, words):
    models = pair()
    refuse(*words, call=lambda: sm.generate(models.target, [[1]], draft=models.drafts["near"], **options))
    refuse(*words, call=lambda: sm.generate(models.target, [[1], [2]], **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *[({"temperature": t}, ["temperature", t]) for t in (-0.1, -1, *NO_NUMBERS)],
        *[({"top_k": k}, ["top_k", k]) for k in (-1, 2**63, *NO_WHOLE_NUMBERS)],
        *[({"top_p": p}, ["top_p", p]) for p in (0, 0.0, -0.5, 1.01, 2, *NO_NUMBERS)],
        *[({"min_p": p}, ["min_p", p]) for p in (1, 1.0, 1.5, -0.01, *NO_NUMBERS)],
        *[({"repetition_penalty": p}, ["repetition_penalty", p]) for p in (0, 0.0, -1.2, *NO_NUMBERS)],
        *[({"seed": s}, ["seed", "2^63-1"]) for s in (-1, 2**63, 2**64, 0.5, 1.0, True, "1", None, NAN)],
        *[({"seed": s}, ["seed", "2^63-1"]) for s in ([1, -1], (1, 2**63), [1, 2.0], [None], ["1"], [True], {1: 2})],
        *[({"seed": s}, ["seed"]) for s in ([[1]], b"1", torch.tensor([1, 2]))],
    ],
    ids=str,
)
def test_sampling(options, words):
    refuse(*words, call=lambda: sm.SamplingParams(**options))


def test_numbers_of_too_many_digits_to_print(pair):
    huge, target = 10**5000, pair().target
    refuse("token id", "row 0", call=lambda: sm.generate(target, [[huge]]))
    refuse("lookahead", "1 to 15", call=lambda: sm.generate(target, [[1]], lookahead=huge))
    refuse("max_new_tokens", call=lambda: sm.generate(target, [[1]], max_new_tokens=huge))
    refuse("seed", "2^63-1", call=lambda: sm.SamplingParams(seed=huge))


@pytest.mark.parametrize("seeds", [[], [1], [1, 2], [1, 2, 3, 4]], ids=str)
def test_a_seed_for_every_row(pair, seeds):
    sampling = sm.SamplingParams(temperature=1.0, seed=seeds)
    refuse(len(seeds), "3 rows", call=lambda: sm.generate(pair().target, [[1], [2], [3]], sampling=sampling))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1e-7},
        {"temperature": 1, "top_k": 10**9, "top_p": 1, "min_p": 0, "repetition_penalty": 1},
        {"temperature": 1, "seed": 2**63 - 1},
        {"temperature": 1, "seed": [0, 2**63 - 1]},
        {"temperature": 1e9, "min_p": 0.999999},
        {"temperature": 1.0, "top_p": 1e-9, "repetition_penalty": 1e-3},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges(pair, options):
    models = pair()
    for acceptance in ("rejection", "coupled"):
        result = sm.generate(
            models.target, [[1], [2, 3]], draft=models.drafts["near"], max_new_tokens=6, stop_token_ids=(),
            sampling=sm.SamplingParams(**options), acceptance=acceptance,
        )  # fmt: skip
        assert [len(sequence) for sequence in result.sequences] == [7, 8]


@pytest.mark.parametrize("temperature", [0, 1e-7, 1e-5, 1e-4])
def test_tiny_temperatures_are_greedy(pair, plain, prompt, temperature, recwarn):
    models = pair()
    sampling = sm.SamplingParams(temperature=temperature, seed=3)
    for draft in (None, models.drafts["near"]):
        result = sm.generate(
            models.target, [prompt(5)], draft=draft, max_new_tokens=9, stop_token_ids=(), sampling=sampling
        )
        assert result.sequences[0].tolist() == plain(models.target, prompt(5), 9)[0]
    assert not recwarn.list


@pytest.mark.parametrize("stops", [(), [7], (7, 8), {7}, frozenset({7}), range(3), {7: 1}], ids=str)
def test_forms_of_stop_token_ids(pair, plain, prompt, stops):
    text, count = plain(pair().target, prompt(3), 9)[0], 12
    end = next((at + 1 for at in range(3, count) if text[at] in stops), count)
    result = sm.generate(pair().target, [prompt(3)], max_new_tokens=9, stop_token_ids=stops)
    assert result.sequences[0].tolist() == text[:end]


@pytest.mark.parametrize("target", ["builtin:target", None, 3, [[1]]], ids=str)
def test_a_target_that_is_no_model(target):
    refuse("target", call=lambda: sm.generate(target, [[1]]))


def test_another_vocabulary(pair):
    draft = random_model(tiny_config(vocab_size=62))
    refuse("vocabular", 61, 62, call=lambda: sm.generate(pair().target, [[1]], draft=draft))
    refuse("vocabular", 6, call=lambda: sm.generate(pair().target, [[1]], draft=TableModel(torch.eye(6))))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_nan(backend, temperature):
    broken = random_model(tiny_config(), backend=backend)
    broken.norm_weight = broken.norm_weight * torch.nan
    refuse(
        "NaN", "row 0",
        call=lambda: sm.generate(broken, [[1, 2]], sampling=sm.SamplingParams(temperature=temperature)),
    )  # fmt: skip


def test_nothing_runs_before_the_check(pair, monkeypatch):
    target = pair().target
    monkeypatch.setattr(type(target), "_blocks", lambda *arguments: pytest.fail("the model was run"))
    refuse("row 1", call=lambda: sm.generate(target, [[1] * 100, [61]]))
    refuse("lookahead", call=lambda: sm.generate(target, [[1] * 100], draft=target, lookahead=0))


def test_accepted_forms_of_a_prompt(pair):
    target = pair().target
    forms = [
        [[1, 2]],
        ((1, 2),),
        torch.tensor([[1, 2]]),
        torch.tensor([[1, 2]], dtype=torch.int32),
        [torch.tensor([1, 2])],
    ]
    texts = [sm.generate(target, form, max_new_tokens=4).sequences[0].tolist() for form in forms]
    assert all(text == texts[0] for text in texts)


@pytest.fixture(scope="module")
def words():
    """A model with a tokenizer of transformers and its own: words w0 to w50, and special tokens."""
    specials = {"<pad>": 51, "<s>": 52, "</s>": 53, "<unk>": 54}
    vocabulary = {f"w{token}": token for token in range(51)} | specials
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(specials))
    target = random_model(tiny_config(vocab_size=61, tie_embeddings=False))
    target.load_tokenizer = lambda: tokenizer
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    return target, fast, tokenizer


TEXTS = ["w1 w2 w3 w4 w5", "w7", "w9 w8 w7"]
IDS = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]


def continued(target, prompts, **options):
    result = sm.generate(target, prompts, max_new_tokens=6, stop_token_ids=(), **options)
    return [sequence.tolist() for sequence in result.sequences]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("returned", ["pt", "np", None])
def test_what_tokenizers_of_transformers_return(words, side, returned):
    """Padded rows equal those of single runs: the whole object, its parts, and each text by itself."""
    target, fast, _ = words
    expected = [continued(target, [ids])[0] for ids in IDS]
    encoded = fast(TEXTS, padding=True, padding_side=side, return_tensors=returned)
    mask = encoded["attention_mask"]
    for prompts, options in (
        (encoded, {}),
        (dict(encoded), {}),
        (encoded["input_ids"], {"attention_mask": mask}),
        (encoded["input_ids"], {"attention_mask": mask.tolist() if returned else mask}),
        (fast(TEXTS), {}),
        ([fast(text) for text in TEXTS], {}),
        (torch.as_tensor(encoded["input_ids"]), {"attention_mask": torch.as_tensor(mask).bool()}),
    ):
        assert continued(target, prompts, **options) == expected
    assert continued(target, fast(TEXTS[0])) == expected[:1]
    assert continued(target, fast(TEXTS[0], return_tensors="pt")) == expected[:1]


def test_what_tokenizers_return(words):
    target, _, tokenizer = words
    expected = [continued(target, [ids])[0] for ids in IDS]
    padding = copy.deepcopy(tokenizer)
    padding.enable_padding(pad_id=51, pad_token="<pad>")
    for encode in (tokenizer, padding):
        assert continued(target, encode.encode_batch(TEXTS)) == expected
    assert continued(target, tokenizer.encode(TEXTS[0])) == expected[:1]
    assert continued(target, [tokenizer.encode(TEXTS[0])]) == expected[:1]


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda rows: rows], ids=["tensor", "array", "lists"])
@pytest.mark.parametrize(
    ("rows", "token"),
    [
        ([[1, 2, 3], [7, 51, 51]], 51),
        ([[1, 2, 3], [51, 51, 7]], 51),
        ([[1, 2], [7, 51]], 51),
        ([[1, 51], [7, 51]], 51),
        ([[1, 2, 51, 51]], 51),
        ([[51, 51], [1, 2]], 51),
        ([[1, 2, 3], [7, 53, 53]], 53),
        ([[1, 2, 4], [53, 53, 1]], 53),
        ([[54, 54, 1], [1, 2, 3]], 54),
    ],
    ids=str,
)
def test_rows_that_look_padded_are_refused_by_name(words, make, rows, token):
    target, _, _ = words
    refuse("padded", f"token {token}", "attention_mask", call=lambda: sm.generate(target, make(rows)))
    ones = [[1] * len(row) for row in rows]
    alone = [continued(target, [row], attention_mask=[[1] * len(row)])[0] for row in rows]
    assert continued(target, make(rows), attention_mask=ones) == alone


@pytest.mark.parametrize("rows", [[[52, 1], [52, 2]], [[1, 53], [2, 53]], [[1, 1], [2, 2]], [[51, 1], [2]]], ids=str)
def test_rows_that_do_not_look_padded(words, rows):
    target, _, _ = words
    alone = [continued(target, [row], attention_mask=[[1] * len(row)])[0] for row in rows]
    assert continued(target, rows) == alone
    if len(rows[0]) == len(rows[1]):
        assert continued(target, torch.tensor(rows)) == continued(target, rows)


@pytest.mark.parametrize(
    ("prompts", "mask", "told"),
    [
        ([[1, 2]], [[1, 1], [1, 1]], ["attention_mask", "2 rows"]),
        ([[1, 2]], [[1]], ["attention_mask", "row 0", "1 entries for 2"]),
        ([[1, 2, 3]], [[1, 0, 1]], ["row 0", "middle"]),
        ([[1, 2]], [[0, 0]], ["row 0", "empty"]),
        ([[1, 2]], [[1, 2]], ["0 and 1"]),
        ([[1, 2]], [[1, None]], ["0 and 1"]),
        ([[1, 2]], 1, ["attention_mask"]),
        ([[1, 2]], [1, 1], ["attention_mask"]),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, [[1, 1]], ["twice"]),
        ({"ids": [[1, 2]]}, None, ["input_ids"]),
        ({}, None, ["input_ids"]),
        ({"input_ids": ["a"]}, None, ["text"]),
        ([{"input_ids": [[1]]}], None, ["[1]"]),
    ],
    ids=str,
)
def test_masks(pair, prompts, mask, told):
    refuse(*told, call=lambda: sm.generate(pair().target, prompts, attention_mask=mask))


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "eager"])
@pytest.mark.parametrize("draft", ["model", "ngram", "scripted", None])
def test_defaults_of_torch_do_not_matter(draft, replayed):
    """No tensor of the loop is made without its dtype and device."""
    target = TableModel(torch.eye(11).roll(1, 1) + 0.02)
    drafts = {
        "model": TableModel(torch.eye(11).roll(1, 1) + 0.1),
        "scripted": ScriptedDraft([[1, 2]] * 2, 11, lambda r, at: True),
    }
    executor = RecordingExecutor() if replayed and draft != "scripted" else "eager"
    texts = []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "meta"), (torch.float64, "meta")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            for acceptance in ("rejection", "coupled"):
                for sampling in (
                    sm.SamplingParams(),
                    sm.SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=[1, 2]),
                ):
                    result = sm.generate(
                        target, [[1, 2, 1], [4]], draft=drafts.get(draft, draft), max_new_tokens=8, sampling=sampling,
                        acceptance=acceptance, executor=executor, output_logits=True, cache=sm.GenerationCache(),
                    )  # fmt: skip
                    assert result.sequences[0].device.type == "cpu" and result.logits[0].dtype == torch.float32
                    texts.append([text.tolist() for text in result.sequences])
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert texts[:4] == texts[4:8] == texts[8:]


@pytest.mark.parametrize("dtype", [torch.float32, "q8_0"], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_defaults_of_torch_do_not_matter_to_models(kind, dtype):
    target, draft = (random_model(tiny_architecture(kind, seed, d=32), dtype=dtype, seed=seed) for seed in (0, 1))
    texts = []
    for default, device in ((torch.float32, "cpu"), (torch.bfloat16, "meta")):
        torch.set_default_dtype(default)
        torch.set_default_device(device)
        try:
            for drafter in (None, draft, "ngram"):
                for sampling in (sm.SamplingParams(), sm.SamplingParams(temperature=1.0, top_p=0.9, seed=3)):
                    result = sm.generate(
                        target, [[1, 2, 1, 2], [4]], draft=drafter, max_new_tokens=4, sampling=sampling,
                        stop_token_ids=(), cache=sm.GenerationCache(),
                    )  # fmt: skip
                    texts.append([text.tolist() for text in result.sequences])
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert texts[:6] == texts[6:]
