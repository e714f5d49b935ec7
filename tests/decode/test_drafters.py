"""Any class can be the draft: it may propose fewer tokens than asked for, and what makes no sense is refused."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode import ModelDrafter
from speculative_mamba.testing.models import random_model, tiny_config
from speculative_mamba.testing.recording import RecordingExecutor
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal

COUNTS = (3, 0, 2, 0, 1)
LENGTHS = (1, 2, 9, 66)
TOKENS = 24


class Few(ScriptedDraft):
    """Proposes 3, 0, 2, 0, 1 tokens in turn, of which the last is wrong now and then."""

    def __init__(self, texts, agree):
        super().__init__(texts, 61, agree)
        self.counts, self.accepted = iter(COUNTS * 20), []

    def propose(self, rows, accepted, lookahead):
        self.accepted.append(accepted.tolist())
        tokens = super().propose(rows, accepted, lookahead)[0]
        return tokens[:, : min(next(self.counts), lookahead)], None


class FewOfAModel(ModelDrafter):
    """A draft model of whose tokens and probabilities only the first 3, 0, 2, 0, 1 are used."""

    capturable = False

    def __init__(self, model):
        super().__init__(model)
        self.counts = iter(COUNTS * 20)

    def propose(self, state, lookahead):
        whole = super().propose(state, lookahead)
        count = min(next(self.counts), lookahead)
        probs = None if whole.probs is None else whole.probs[:, :count].contiguous()
        return sm.Proposal(whole.tokens[:, :count].contiguous(), probs, whole.num_tokens, whole.row_status[:count])


def right_but_for(every):
    return lambda row, at: (at + row) % every != 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("draft", ["right", "half", "third", "wrong", "model"])
def test_three_none_two_none_one(pair, plain, prompt, draft, backend):
    """Rounds without a draft go on from the accepted slot, and drafts after them too."""
    models = pair(backend=backend)
    prompts = [prompt(length) for length in LENGTHS]
    texts = [plain(models.target, p, TOKENS) for p in prompts]
    agree = {"right": right_but_for(10**6), "half": right_but_for(2), "third": right_but_for(3)}
    proposer = (
        FewOfAModel(models.drafts["near"])
        if draft == "model"
        else Few([tokens for tokens, _ in texts], agree.get(draft, lambda row, at: False))
    )
    log = []
    result = sm.generate(
        models.target, prompts, draft=proposer, lookahead=3, max_new_tokens=TOKENS, stop_token_ids=(),
        output_logits=True, on_token=lambda row, token: log.append((row, token)),
    )  # fmt: skip
    for row, (tokens, logits) in enumerate(texts):
        assert result.sequences[row].tolist() == tokens
        assert_bitwise_equal(result.logits[row], logits)
        assert [token for r, token in log if r == row] == tokens[len(prompts[row]) :]
    stats = result.stats
    assert stats.tokens == TOKENS * len(prompts)
    cut = stats.accepted + stats.row_rounds - stats.tokens  # rows that ended with a drafted token
    assert 0 <= cut <= len(prompts)
    if draft == "right":
        assert proposer.accepted[:6] == [[n] * 4 for n in (0, *COUNTS)]
        assert stats.drafted == stats.accepted and stats.acceptance_rate == 1
    if draft == "wrong":
        assert stats.accepted == 0 and stats.rounds == TOKENS


@pytest.mark.parametrize("lookahead", [3, 8])
def test_few_tokens_of_a_model_with_coupled_and_rejection_sampling(pair, prompt, lookahead):
    models, prompts = pair(), [prompt(length) for length in LENGTHS]
    sampling = sm.SamplingParams(temperature=0.9, top_k=30, seed=4)
    options = {"max_new_tokens": TOKENS, "stop_token_ids": (), "sampling": sampling, "acceptance": "coupled"}
    plainly = sm.generate(models.target, prompts, **options)
    result = sm.generate(
        models.target, prompts, draft=FewOfAModel(models.drafts["near"]), lookahead=lookahead, **options
    )
    for a, b in zip(plainly.sequences, result.sequences, strict=True):
        assert torch.equal(a, b)
    by_rejection = sm.generate(
        models.target, prompts, draft=FewOfAModel(models.drafts["near"]), lookahead=lookahead,
        **{**options, "acceptance": "rejection"},
    )  # fmt: skip
    assert [len(sequence) for sequence in by_rejection.sequences] == [n + TOKENS for n in LENGTHS]


def test_few_tokens_of_an_equal_model_are_all_accepted(pair, prompt, assert_states_fit):
    """Its state stays that of the text, whatever part of its proposals is used."""
    target, cache = pair().target, sm.GenerationCache()
    stats = sm.generate(
        target, [prompt(length) for length in LENGTHS], draft=FewOfAModel(target), lookahead=3, max_new_tokens=TOKENS,
        stop_token_ids=(), cache=cache,
    ).stats  # fmt: skip
    assert stats.accepted == stats.tested > 0
    assert_states_fit(cache)


def test_a_draft_that_never_proposes_is_plain_decoding(pair, plain, prompt):
    class Silent:
        vocab_size = 61

        def begin(self, prompts, lookahead, sampler): ...

        def propose(self, rows, accepted, lookahead):
            return torch.empty(len(rows), 0, dtype=torch.int64), None

    result = sm.generate(pair().target, [prompt(3)], draft=Silent(), max_new_tokens=9, stop_token_ids=())
    assert result.sequences[0].tolist() == plain(pair().target, prompt(3), 9)[0]
    stats = result.stats
    assert stats.drafted == stats.tested == stats.accepted == 0 and stats.rounds == stats.tokens == 9
    assert stats.acceptance_rate is None and stats.tokens_per_round == 1


class Answers:
    """An attribute of any name, as those have that pass on to something else."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def decorated(base, **attributes):
    return type("Decorated", (base,), attributes)


NAMES = (
    "draft", "prepare", "model", "device", "text", "layers", "reserve", "drafter", "backend", "counts", "name",
    "tokenizer", "launch", "snapshot", "capturable", "allocate", "prefill",
)  # fmt: skip


def not_called(*arguments, **options):
    pytest.fail("called")


@pytest.mark.parametrize(
    "attributes",
    [
        *(dict.fromkeys(NAMES, value) for value in (None, "cpu", not_called)),
        dict.fromkeys(("new_cache", "prefill", "verify", "eos_token_id", "device"), not_called),
    ],
    ids=["None", "a string", "methods", "those of a model"],
)
def test_what_else_a_drafter_has_does_not_matter(pair, plain, prompt, attributes):
    """It is one because it proposes."""
    text = plain(pair().target, prompt(3), 9)[0]
    draft = decorated(ScriptedDraft, **attributes)([text], 61, lambda row, at: at % 4 != 0)
    result = sm.generate(pair().target, [prompt(3)], draft=draft, max_new_tokens=9, stop_token_ids=())
    assert result.sequences[0].tolist() == text and 0 < result.stats.accepted < result.stats.tested


def test_a_drafter_that_answers_to_every_name(pair, plain, prompt):
    text = plain(pair().target, prompt(3), 9)[0]
    draft = decorated(ScriptedDraft, __getattr__=Answers.__getattr__)([text], 61, lambda row, at: True)
    result = sm.generate(
        pair().target, [prompt(3)], draft=draft, max_new_tokens=9, stop_token_ids=(), cache=sm.GenerationCache()
    )
    assert result.sequences[0].tolist() == text and result.stats.acceptance_rate == 1


def test_the_texts_that_a_drafter_gets_are_its_own(pair, plain, prompt):
    class Careless(ScriptedDraft):
        def propose(self, rows, accepted, lookahead):
            proposal = super().propose(rows, accepted, lookahead)
            for row in rows:
                row.clear()
            return proposal

    text = plain(pair().target, prompt(3), 9)[0]
    draft = Careless([text], 61, lambda row, at: at % 3 != 0)
    result = sm.generate(pair().target, [prompt(3)], draft=draft, max_new_tokens=9, stop_token_ids=())
    assert result.sequences[0].tolist() == text


def test_what_a_drafter_is_told(pair, prompt):
    """Prompts first; then each round's committed text, the counts of the last round, and how many may be drafted."""
    calls, log = [], [[], []]

    class Nosy:
        vocab_size = 61

        def begin(self, prompts, lookahead, sampler):
            calls.append((prompts, lookahead))

        def propose(self, rows, accepted, lookahead):
            calls.append(([list(row) for row in rows], accepted.tolist(), lookahead))
            return torch.full((len(rows), lookahead), 7), None

    prompts = [prompt(2), prompt(5)]
    result = sm.generate(
        pair().target, prompts, draft=Nosy(), lookahead=6, max_new_tokens=5, stop_token_ids=(),
        on_token=lambda row, token: log[row].append(token),
    )  # fmt: skip
    assert calls[0] == (prompts, 4), "more than the budget is of no use"
    assert calls[1] == (prompts, [0, 0], 4)
    for rows, accepted, lookahead in calls[1:]:
        for row, text in enumerate(rows):
            assert text == result.sequences[row].tolist()[: len(text)]
        assert 1 <= lookahead <= 4 and len(accepted) == 2


def proposing(tokens, probs=None):
    class Proposal:
        vocab_size = 61

        def begin(self, prompts, lookahead, sampler): ...

        def propose(self, rows, accepted, lookahead):
            return tokens, probs

    return Proposal()


def certain(rows, count, vocabulary):
    return torch.ones(rows, count, vocabulary) / vocabulary


FIVES = torch.full((2, 3), 5)


@pytest.mark.parametrize(
    ("tokens", "probs", "words"),
    [
        (torch.full((2, 4), 5), None, ["(2, 4)", "at most 3"]),
        (torch.full((1, 3), 5), None, ["(1, 3)"]),
        (torch.full((3, 3), 5), None, ["(3, 3)"]),
        (torch.full((2,), 5), None, ["(2,)"]),
        (torch.full((2, 3, 1), 5), None, ["(2, 3, 1)"]),
        (torch.full((2, 3), 61), None, ["61", "0 to 60"]),
        (torch.full((2, 3), -1), None, ["-1", "0 to 60"]),
        (torch.full((2, 3), 5.0), None, ["float32", "int64"]),
        (torch.full((2, 3), 5, dtype=torch.int32), None, ["int32", "int64"]),
        ([[5, 5, 5]] * 2, None, ["draft", "list"]),
        (None, None, ["draft", "None"]),
        (FIVES, certain(2, 2, 61), ["probs", "(2, 2, 61)"]),
        (FIVES, certain(2, 4, 61), ["probs", "(2, 4, 61)"]),
        (FIVES, certain(1, 3, 61), ["probs", "(1, 3, 61)"]),
        (FIVES, certain(2, 3, 60), ["probs", "(2, 3, 60)"]),
        (FIVES, certain(2, 3, 61)[0], ["probs", "(3, 61)"]),
        (FIVES, certain(2, 3, 61).double(), ["probs", "float64"]),
        (FIVES, [[0.5]], ["probs", "list"]),
        (FIVES, torch.zeros(2, 3, 61), ["draft_probs", "no probability"]),
        (FIVES, torch.full((2, 3, 61), torch.nan), ["probab"]),
    ],
    ids=[
        "too many", "too few rows", "too many rows", "one dimension", "three dimensions", "too large", "negative",
        "float", "int32", "list", "nothing", "few probs", "many probs", "probs of one row", "narrow probs",
        "flat probs", "float64 probs", "probs as a list", "zero probs", "NaN probs",
    ],
)  # fmt: skip
def test_proposals_that_make_no_sense(pair, tokens, probs, words):
    with pytest.raises(ValueError) as caught:
        sm.generate(
            pair().target, [[1], [2]], draft=proposing(tokens, probs), lookahead=3,
            sampling=sm.SamplingParams(temperature=1.0),
        )  # fmt: skip
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("returned", [FIVES, (FIVES,), (FIVES, None, None)], ids=["no pair", "one", "three"])
def test_a_proposal_is_a_pair(pair, returned):
    draft = proposing(None)
    draft.propose = lambda rows, accepted, lookahead: returned
    with pytest.raises(ValueError) as caught:
        sm.generate(pair().target, [[1], [2]], draft=draft, lookahead=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "draft", ["builtin:draft", 3, object(), [[1, 2]], {"model": 1}], ids=lambda d: type(d).__name__
)
def test_a_draft_that_is_neither_model_nor_drafter(pair, draft):
    with pytest.raises(ValueError, match="draft") as caught:
        sm.generate(pair().target, [[1]], draft=draft)
    assert "\n" not in str(caught.value)


def test_a_draft_with_half_of_the_methods(pair):
    class Half:
        vocab_size = 61

        def begin(self, prompts, lookahead, sampler): ...

    with pytest.raises(ValueError, match="draft") as caught:
        sm.generate(pair().target, [[1]], draft=Half())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_of_another_dtype(pair, plain, prompt, temperature):
    """A bfloat16 draft serves a float32 target, a float32 draft a bfloat16 target."""
    for of_target, of_draft in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        target, draft = pair(of_target).target, pair(of_draft).drafts["near"]
        prompts = [prompt(length) for length in LENGTHS]
        options = {
            "max_new_tokens": 12, "stop_token_ids": (), "acceptance": "coupled", "output_logits": True,
            "sampling": sm.SamplingParams(temperature=temperature, seed=2),
        }  # fmt: skip
        plainly = sm.generate(target, prompts, **options)
        result = sm.generate(target, prompts, draft=draft, **options)
        for row in range(len(prompts)):
            assert torch.equal(result.sequences[row], plainly.sequences[row])
            assert_bitwise_equal(result.logits[row], plainly.logits[row])
        assert result.stats.accepted > 0


def test_a_draft_on_another_device_is_refused_by_name(pair):
    draft = random_model(tiny_config())
    draft = dataclasses.replace(draft, embedding=draft.embedding.to("meta"), head=draft.head.to("meta"))
    with pytest.raises(ValueError, match="meta and cpu") as caught:
        sm.generate(pair().target, [[1, 2]], draft=draft)
    assert "\n" not in str(caught.value) and "draft" in str(caught.value)


def test_the_examples_of_the_document_run():
    """One after the other; the draft on the device in captured rounds, too."""
    names, text = {}, (Path(__file__).parents[2] / "docs" / "write-a-drafter.md").read_text(encoding="utf-8")
    for example in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(example, names)
    again = sm.generate(
        names["target"], [names["prompt"]], draft=names["draft"], max_new_tokens=40, executor=RecordingExecutor()
    )
    assert again.sequences[0].tolist() == names["before"] and again.stats.accepted == names["result"].stats.accepted > 0
