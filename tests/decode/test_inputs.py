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
        ([1, 2, 3], ["list of lists"]),
        (7, ["list of lists"]),
    ],
    ids=str,
)
def test_prompts(pair, prompts, words):
    refuse(*words, call=lambda: sm.generate(pair().target, prompts))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *[({"lookahead": k}, ["lookahead", k, "1 to 15"]) for k in (0, -1, 16, 1000, 2.0, True, "4")],
        *[({"max_new_tokens": n}, ["max_new_tokens", n]) for n in (-1, 1.5, "8", True)],
        ({"acceptance": "always"}, ["acceptance", "always", "rejection"]),
        ({"stop_strings": "abc"}, ["stop_strings", "abc"]),
        ({"stop_strings": [""]}, ["stop_strings"]),
        ({"stop_strings": [3]}, ["stop_strings", 3]),
        ({"stop_strings": ["x"]}, ["tokenizer"]),
    ],
    ids=str,
)
def test_options(pair, options, words):
    models = pair()
    refuse(*words, call=lambda: sm.generate(models.target, [[1]], draft=models.drafts["near"], **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *[({"temperature": t}, ["temperature"]) for t in (-0.1, float("nan"), float("inf"), "1", None)],
        *[({"top_k": k}, ["top_k", k]) for k in (-1, 2.5, "3")],
        *[({"top_p": p}, ["top_p", p]) for p in (0, 0.0, -0.5, 1.01, float("nan"), "0.5")],
        *[({"seed": s}, ["seed", s]) for s in (-1, 2**63, 0.5)],
    ],
    ids=str,
)
def test_sampling(options, words):
    refuse(*words, call=lambda: sm.SamplingParams(**options))


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


def test_a_draft_of_another_dtype(pair, plain, prompt):
    """A bfloat16 draft serves a float32 target."""
    draft = pair(torch.bfloat16).drafts["near"]
    target = pair().target
    result = sm.generate(target, [prompt(5)], draft=draft, max_new_tokens=12, stop_token_ids=())
    assert result.sequences[0].tolist() == plain(target, prompt(5), 12)[0]
