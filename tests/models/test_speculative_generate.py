"""``custom_generate=speculative_generate``: what ``generate`` of transformers gives without it, token for token."""

import gc
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from published import FORMATS, random_hugging_face_model

import speculative_mamba as sm
from speculative_mamba.decode.call import Call
from speculative_mamba.integrations import transformers as integration
from speculative_mamba.integrations.transformers import speculative_generate
from speculative_mamba.integrations.transformers_processors import sampling_of
from speculative_mamba.testing.text import byte_level_tokenizer

transformers = pytest.importorskip("transformers")
PROMPT = torch.tensor([[5, 9, 33, 2, 60]])
EOS, PAD = 7, 1
# Rows of unequal length, padded on the left.
PADDED = {
    "input_ids": torch.tensor([[PAD, PAD, 5, 9], [12, 33, 2, 60], [PAD, 50, 50, 4]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
}


@pytest.fixture(scope="module")
def target() -> Any:
    model = random_hugging_face_model(0, eos_token_id=EOS)
    model.generation_config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    """It agrees with the target now and then."""
    model = random_hugging_face_model(0, eos_token_id=EOS)
    with torch.no_grad():
        noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
        model.lm_head.weight.add_(0.02 * noise)
    return model


@pytest.fixture(scope="module")
def generate(target: Any, draft: Any) -> Any:
    """generate(**options): the rows with a draft, after they were found to be those of transformers alone."""

    def run(inputs: dict[str, torch.Tensor] | None = None, **options: Any) -> torch.Tensor:
        inputs = {"input_ids": PROMPT} if inputs is None else inputs
        plain = target.generate(**inputs, **options)
        ours = target.generate(**inputs, **options, custom_generate=speculative_generate, draft=draft)
        assert torch.equal(ours, plain)
        return ours

    return run


def speculate(model: Any, inputs: torch.Tensor = PROMPT, **options: Any) -> Any:
    return model.generate(inputs, custom_generate=speculative_generate, **options)


@pytest.mark.parametrize(
    "name", ["mamba-hf", *(name for name in FORMATS if name.endswith("-hf") and "-moe-" not in name)]
)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Greedy text is that of transformers; sampled text of one seed is the same with a draft and without."""
    models = [
        random_hugging_face_model(seed) if name == "mamba-hf" else FORMATS[name](tmp_path, seed).model
        for seed in (0, 1)
    ]
    plain = models[0].generate(PROMPT, max_new_tokens=24, do_sample=False)
    assert torch.equal(speculate(models[0], max_new_tokens=24, draft=models[1]), plain)
    assert torch.equal(speculate(models[0], max_new_tokens=24, draft=models[0], lookahead=7), plain)
    sampled = {"do_sample": True, "seed": 3, "acceptance": "coupled", "max_new_tokens": 24, "temperature": 0.9}
    one = speculate(models[0], **sampled)
    assert torch.equal(speculate(models[0], draft=models[1], **sampled), one) and not torch.equal(one, plain)


CONFIGURED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[33], [9, 41]]},
    "min_new_tokens": {"min_new_tokens": 12},
    "min_length": {"min_length": 14},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "suppress_tokens": {"suppress_tokens": [33, 2, 60]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [34, 18, 52]},
    "sequence_bias": {"sequence_bias": [[[33], -5.0], [[12], 3.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.4)},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "renormalize_logits": True, "min_new_tokens": 5},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [row + 10, 20 + int(ids[-1]) % 30, 40]},
    "max_length": {"max_length": 11},
}


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@pytest.mark.parametrize("name", CONFIGURED)
def test_what_a_configuration_says(name: str, padded: bool, generate: Any) -> None:
    """Processors that transformers makes apply once, in its order, also to rows with padding before them."""
    length = {} if name == "max_length" else {"max_new_tokens": 18}
    rows = generate(PADDED if padded else None, do_sample=False, **length, **CONFIGURED[name])
    assert rows.shape[1] > 8


def test_the_options_make_a_difference(target: Any) -> None:
    def text(**options: Any) -> list:
        return target.generate(**PADDED, max_new_tokens=18, custom_generate=speculative_generate, **options).tolist()

    plain = text()
    options = {name: its for name, its in CONFIGURED.items() if name not in ("nothing", "max_length")}
    assert [name for name, its in options.items() if text(**its) == plain] == []


class EveryThird(transformers.LogitsProcessor):
    """Forbids tokens by how long the text is."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, input_ids.shape[1] % 3 :: 3] = -torch.inf
        return scores


def test_processors_of_the_caller(generate: Any) -> None:
    """Behind the penalty, as in transformers."""
    generate(PADDED, max_new_tokens=12, repetition_penalty=2.0, logits_processor=[EveryThird()])


SAMPLED = [
    ({}, {"top_k": 50}),  # which transformers adds
    ({"top_k": 0, "temperature": 0.7}, {"temperature": 0.7}),
    ({"top_k": 9, "top_p": 0.8}, {"top_k": 9, "top_p": 0.8}),
    ({"top_k": 0, "min_p": 0.05, "repetition_penalty": 1.3}, {"min_p": 0.05, "repetition_penalty": 1.3}),
]


@pytest.mark.parametrize(("theirs", "ours"), SAMPLED, ids=str)
def test_sampling_is_the_samplers_own(theirs: dict, ours: dict, target: Any, draft: Any) -> None:
    for options in (theirs, {"generation_config": transformers.GenerationConfig(seed=11, do_sample=True, **theirs)}):
        seed = {} if "generation_config" in options else {"seed": 11, "do_sample": True}
        rows = speculate(target, draft=draft, acceptance="coupled", max_new_tokens=20, **options, **seed)
        params = sm.SamplingParams(**{"temperature": 1.0, **ours}, seed=11)
        expected = sm.generate(
            sm.from_transformers(target), PROMPT, sampling=params, acceptance="coupled", max_new_tokens=20
        )
        assert rows[0].tolist() == expected.sequences[0].tolist()


def test_a_filter_of_another_kind_runs_before_the_draw(target: Any) -> None:
    """typical_p is not the sampler's: it and all before it run in Python, and nothing twice."""
    rows = speculate(
        target, PROMPT.repeat(40, 1), do_sample=True, seed=1, top_k=8, typical_p=0.5, max_new_tokens=1, temperature=2.0
    )
    processors = transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(2.0),
            transformers.TopKLogitsWarper(8),
            transformers.TypicalLogitsWarper(0.5),
        ]
    )
    allowed = processors(PROMPT, target(PROMPT).logits[:, -1].detach())[0] > -torch.inf
    assert 1 < allowed.sum() < 8 and allowed[rows[:, -1]].all() and len(set(rows[:, -1].tolist())) > 1


def test_only_the_end_of_the_list_that_is_in_the_samplers_order_is_the_samplers() -> None:
    min_p, top_k = transformers.MinPLogitsWarper(0.1), transformers.TopKLogitsWarper(5)
    penalty, padding = transformers.RepetitionPenaltyLogitsProcessor(1.3), torch.zeros(1, dtype=torch.int64)
    for processors, rest, fields in (
        ([penalty, top_k, min_p], [], {"repetition_penalty": 1.3, "top_k": 5, "min_p": 0.1}),
        ([min_p, top_k], [min_p], {"top_k": 5}),
        ([penalty, EveryThird(), min_p], 2, {"min_p": 0.1}),
        ([top_k, transformers.TopPLogitsWarper(0.5, min_tokens_to_keep=2)], 2, {}),
    ):
        found = sampling_of(transformers.LogitsProcessorList(processors), True, 7, padding)
        rest = processors[:rest] if isinstance(rest, int) else rest
        assert found == (sm.SamplingParams(temperature=1.0, seed=7, **fields), rest)


def test_seeds(target: Any) -> None:
    """Without one of its own a call takes the next from PyTorch's generator."""
    texts = []
    for _ in range(2):
        torch.manual_seed(4)
        texts.append([speculate(target, do_sample=True, max_new_tokens=9).tolist() for _ in range(2)])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    before = torch.get_rng_state()
    speculate(target, do_sample=True, seed=1, max_new_tokens=3)
    speculate(target, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_texts_of_one_prompt(target: Any, draft: Any) -> None:
    rows = speculate(target, do_sample=True, seed=2, num_return_sequences=4, max_new_tokens=9, draft=draft)
    assert rows.shape == (4, 14) and len(set(map(tuple, rows.tolist()))) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4), ({"num_assistant_tokens": 2}, 2), ({"num_assistant_tokens": 15}, 15),
        ({"lookahead": 3, "num_assistant_tokens": 2}, 3), ({"lookahead": "auto"}, "auto"),
    ],
)  # fmt: skip
def test_lookahead(options: dict, expected: object, target: Any, draft: Any, monkeypatch: Any) -> None:
    calls, of = [], Call.of
    monkeypatch.setattr(Call, "of", lambda *args, **others: calls.append(of(*args, **others)) or calls[-1])
    speculate(target, draft=draft, max_new_tokens=3, **options)
    assert calls[0].lookahead == expected


class StopsAt(transformers.StoppingCriteria):
    """At a token, or when any row has grown by so many."""

    def __init__(self, token: int, together: int = 10**9) -> None:
        self.token, self.together = token, together

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        return (input_ids[:, -1] == self.token) | (input_ids.shape[1] >= self.together)


@pytest.mark.parametrize("eos", [EOS, None])
def test_stopping_criteria(eos: int | None, generate: Any, target: Any) -> None:
    """Also in the middle of an accepted block, and with other rows that go on."""
    text = target.generate(**PADDED, max_new_tokens=16, eos_token_id=None)[1].tolist()
    for token in text[6:9]:
        rows = generate(PADDED, max_new_tokens=16, eos_token_id=eos, stopping_criteria=[StopsAt(token)])
        assert rows.shape[1] > 5
    rows = generate(PADDED, max_new_tokens=16, eos_token_id=eos, stopping_criteria=[StopsAt(-1, 9)])
    assert rows.shape[1] == 9 or eos is not None


def tokenizer_of_transformers() -> Any:
    backend = byte_level_tokenizer()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def test_stop_strings_and_time(generate: Any, target: Any) -> None:
    tokenizer = tokenizer_of_transformers()
    text = target.generate(PROMPT, max_new_tokens=12)[0].tolist()
    stop = tokenizer.decode(text[8:10])
    criteria = [transformers.StopStringCriteria(tokenizer, [stop])]
    assert len(generate(max_new_tokens=12, stopping_criteria=criteria)[0]) <= 10
    assert generate(max_new_tokens=12, max_time=1e-9).shape == (1, 6)


class Collects(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_streamers_get_what_transformers_gives_them(generate: Any, target: Any, draft: Any) -> None:
    for inputs in ({"input_ids": PROMPT}, PADDED):
        ours, theirs = Collects(), Collects()
        speculate(target, inputs["input_ids"], attention_mask=inputs.get("attention_mask"), streamer=ours, draft=draft,
                  max_new_tokens=12)  # fmt: skip
        target.generate(**inputs, streamer=theirs, max_new_tokens=12)
        assert ours.got == theirs.got and len(ours.got) == 14


def test_text_streamers(target: Any, draft: Any, capsys: Any) -> None:
    tokenizer = tokenizer_of_transformers()
    options = {"max_new_tokens": 12, "draft": draft}
    whole = tokenizer.decode(speculate(target, **options)[0])
    capsys.readouterr()
    speculate(target, streamer=transformers.TextStreamer(tokenizer), **options)
    assert capsys.readouterr().out == whole + "\n"
    streamer = transformers.TextIteratorStreamer(tokenizer, timeout=60)
    thread = threading.Thread(target=speculate, args=(target,), kwargs={"streamer": streamer, **options})
    thread.start()
    assert "".join(streamer) == whole
    thread.join()


def test_a_streamer_ends_also_when_the_call_fails(target: Any) -> None:
    streamer = Collects()
    with pytest.raises(ValueError, match="penalty_alpha"):
        speculate(target, streamer=streamer, max_new_tokens=3, penalty_alpha=0.3)
    assert streamer.got[-1] == "end"


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_are_theirs(padded: bool, target: Any, draft: Any) -> None:
    inputs = PADDED if padded else {"input_ids": PROMPT}
    options = {
        "max_new_tokens": 10, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "repetition_penalty": 1.3, "eos_token_id": None,
    }  # fmt: skip
    theirs = target.generate(**inputs, **options)
    ours = target.generate(**inputs, **options, custom_generate=speculative_generate, draft=draft)
    assert type(ours) is type(theirs) and torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for one, other in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    scores = target.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=True)
    assert scores.shape == (len(ours.sequences), 10) and scores.isfinite().all()


def test_assistant_model_where_transformers_lets_it_through(tmp_path: Path, monkeypatch: Any) -> None:
    """It keeps it to itself, as a streamer."""
    target, draft = (FORMATS["llama-hf"](tmp_path, seed).model for seed in (0, 1))
    drafts, of = [], Call.of
    monkeypatch.setattr(Call, "of", lambda *args, **others: drafts.append(args[3]) or of(*args, **others))
    plain = target.generate(PROMPT, max_new_tokens=9)
    assert torch.equal(speculate(target, assistant_model=draft, max_new_tokens=9), plain)
    assert isinstance(drafts[0], sm.MambaLM)
    with pytest.raises(ValueError, match="draft and assistant_model are both given"):
        speculate(target, assistant_model=draft, draft=draft, max_new_tokens=9)


def test_models_are_taken_over_once_and_again_when_they_changed() -> None:
    model = random_hugging_face_model(3)
    speculate(model, max_new_tokens=5)
    first = integration._taken_over[model]
    speculate(model, max_new_tokens=5)
    assert integration._taken_over[model] is first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    plain = model.generate(PROMPT, max_new_tokens=9, do_sample=False)
    assert torch.equal(speculate(model, max_new_tokens=9), plain)
    model.to(torch.float64)
    assert speculate(model, max_new_tokens=3).shape == (1, 8) and integration._taken_over[model] is not first
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        speculate(model, max_new_tokens=3)
    count = len(integration._taken_over)
    del model, first, parameter
    gc.collect()
    assert len(integration._taken_over) == count - 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 3}, "num_beams = 3 has no meaning"),
    ({"num_beams": 2, "early_stopping": True}, "num_beams = 2"),
    ({"penalty_alpha": 0.3}, "penalty_alpha"),
    ({"guidance_scale": 1.5}, "guidance_scale = 1.5"),
    ({"num_assistant_tokens_schedule": "heuristic"}, "use lookahead='auto'"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ({"num_assistant_tokens": 30}, "lookahead (K)"),
    ({"lookahead": 16}, "lookahead (K)"),
    ({"acceptance": "typical"}, "unknown acceptance"),
    ({"draft": 3}, "draft must be a model"),
    ({"draft": "mamba"}, "unknown draft"),
    ({"seed": -1}, "seed must be"),
    ({"executor": "threads"}, "executor"),
    ({"synced_gpus": True}, "synced_gpus"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused(options: dict[str, Any], message: str, target: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        speculate(target, max_new_tokens=3, **options)
    assert "\n" not in str(error.value)


def test_a_draft_of_other_tokens(target: Any) -> None:
    with pytest.raises(ValueError, match="different vocabularies"):
        speculate(target, max_new_tokens=3, draft=random_hugging_face_model(vocab_size=65))
