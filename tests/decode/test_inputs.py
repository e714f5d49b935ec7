"""Bad arguments of generate: one line that names the value, before anything runs."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import TableModel, random_model, tiny_config


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
        ("abc", ["'a'"]),
        (["abc"], ["'a'"]),
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
        ({"stop_strings": "abc"}, ["stop_strings", "abc"]),
        *[({"stop_strings": s}, ["stop_strings"]) for s in ([""], ["a", ""], [3], [None], 3, None, True, [b"a"])],
        ({"stop_strings": ["x"]}, ["tokenizer"]),
        *[({"on_token": c}, ["on_token"]) for c in (1, "print", [], True)],
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


@pytest.mark.parametrize("stops", [(), [7], (7, 8), {7}, frozenset({7}), [10**9], [-1], range(3), {7: 1}], ids=str)
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
