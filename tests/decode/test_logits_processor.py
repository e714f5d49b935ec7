"""The user's own change of the logits: the same with a draft as without, and nobody else sees it."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal

SAMPLING = {
    "greedy": sm.SamplingParams(),
    "sampled": sm.SamplingParams(temperature=1.0, top_p=0.98, seed=5),
    "penalty": sm.SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=6),
}
LENGTHS = (1, 3, 8)


def is_forbidden(token, position):
    return (token + position) % 3 == 0


class Forbid:
    """Forbids a third of the vocabulary, another third at every position, and notes what it sees."""

    def __init__(self, prompts):
        self.prompts, self.calls = prompts, []

    def __call__(self, row, tokens, logits):
        for position in range(len(self.prompts[row]), len(tokens)):
            assert not is_forbidden(tokens[position], position), "it is shown what it has forbidden"
        assert logits.shape == (61,) and logits.dtype == torch.float32
        self.calls.append((row, list(tokens)))
        position = len(tokens)
        tokens.append(-1)  # the list is its own
        logits[[token for token in range(61) if is_forbidden(token, position)]] = -torch.inf
        return logits


@pytest.fixture
def prompts(prompt):
    return [prompt(length) for length in LENGTHS]


@pytest.fixture
def decode(pair, prompts):
    """decode(sampling, **options): the result, and what the processor was called with."""

    def run(sampling, acceptance="coupled", **options):
        processor = Forbid(prompts)
        result = sm.generate(
            pair().target, prompts, sampling=SAMPLING[sampling], acceptance=acceptance, output_logits=True,
            **{"max_new_tokens": 12, "stop_token_ids": (), "logits_processor": processor, **options},
        )  # fmt: skip
        return result, processor.calls

    return run


def assert_allowed(result, prompts):
    for row, sequence in enumerate(result.sequences):
        new = list(enumerate(sequence.tolist()))[len(prompts[row]) :]
        assert new and not any(is_forbidden(token, position) for position, token in new)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("draft", ["random", "near", "equal", "scripted", "forbidden"])
def test_a_draft_changes_nothing(pair, prompts, decode, sampling, draft):
    """Catches: a processor that looks behind a forbidden token."""
    plainly, _ = decode(sampling)
    texts = [sequence.tolist() for sequence in plainly.sequences]
    assert_allowed(plainly, prompts)
    if draft == "scripted":
        proposer = ScriptedDraft(texts, 61, lambda row, at: (row + at) % 3 != 0)
    elif draft == "forbidden":
        forbidden = [[(-position) % 3 for position in range(40)] for _ in texts]
        proposer = ScriptedDraft(forbidden, 61, lambda row, at: True)
    else:
        proposer = pair().drafts[draft]
    for lookahead in (1, 4, 7):
        result, _ = decode(sampling, draft=proposer, lookahead=lookahead)
        assert [sequence.tolist() for sequence in result.sequences] == texts
        for row in range(len(prompts)):
            assert_bitwise_equal(result.logits[row], plainly.logits[row])
        if draft in ("equal", "forbidden"):
            rate = 1 if draft == "equal" else 0
            assert result.stats.acceptance_rate == rate, "the draft draws from processed logits too"


@pytest.mark.parametrize("draft", ["random", "near", None])
def test_rejection_sampling_respects_it(pair, prompts, decode, draft):
    for sampling in ("sampled", "penalty"):
        result, _ = decode(sampling, acceptance="rejection", draft=pair().drafts.get(draft), max_new_tokens=30)
        assert_allowed(result, prompts)


def test_it_sees_the_text_before_each_position_once(prompts, decode):
    result, calls = decode("sampled")
    for row, given in enumerate(prompts):
        text = result.sequences[row].tolist()
        assert [tokens for r, tokens in calls if r == row] == [text[:end] for end in range(len(given), len(text))]


def test_with_a_draft_it_sees_committed_text_and_drafted_tokens(pair, prompts, decode):
    """Every position of the text, and each time the committed text of that moment comes first."""
    result, calls = decode("sampled", draft=pair().drafts["near"], lookahead=4)
    for row, given in enumerate(prompts):
        text = result.sequences[row].tolist()
        seen = [tokens for r, tokens in calls if r == row]
        assert all(text[:end] in seen for end in range(len(given), len(text)))
        assert all(tokens[: len(given)] == given and len(tokens) < len(text) + 4 for tokens in seen)


def test_the_logits_given_back_are_the_models_own(pair, prompts, decode):
    """The processor changes its argument in place; ``output_logits`` must not show it."""
    target = pair().target
    for draft in (None, pair().drafts["near"]):
        result, _ = decode("greedy", draft=draft)
        for row, given in enumerate(prompts):
            text = result.sequences[row][:-1]
            cache = target.new_cache(1, len(text))
            own = target.verify(text[None], cache, torch.zeros(1, dtype=torch.int32))[0]
            assert_bitwise_equal(result.logits[row], own[len(given) - 1 :])


def test_it_may_return_a_new_tensor(pair, prompts):
    def only(row, tokens, logits):
        return torch.full((61,), -torch.inf).index_fill(0, torch.tensor([len(tokens)]), 0.0)

    for draft in (None, pair().drafts["near"]):
        for sampling in SAMPLING.values():
            result = sm.generate(
                pair().target, prompts, draft=draft, sampling=sampling, max_new_tokens=9, stop_token_ids=(),
                logits_processor=only,
            )  # fmt: skip
            for given, sequence in zip(prompts, result.sequences, strict=True):
                assert sequence.tolist()[len(given) :] == list(range(len(given), len(given) + 9))


def test_the_penalty_comes_after_it():
    """It lifts token 0, which the text holds, to 4 and token 1 to 3; halved after that, 0 loses."""
    seen = []

    def lift(row, tokens, logits):
        seen.append(logits.clone())
        return torch.tensor([4.0, 3.0, 0.0])

    target = TableModel(torch.full((3, 3), 1 / 3))
    for draft in (None, ScriptedDraft([[0, 0]], 3, lambda row, at: True)):
        sampling = sm.SamplingParams(repetition_penalty=2.0)
        result = sm.generate(
            target, [[0]], draft=draft, max_new_tokens=2, sampling=sampling, logits_processor=lift, stop_token_ids=()
        )
        assert result.sequences[0].tolist() == [0, 1, 0], "then 4 / 2 is more than 3 / 2"
    assert all(logits.allclose(torch.full((3,), 1 / 3).log()) for logits in seen), "it sees logits without a penalty"


@pytest.mark.parametrize("draft", ["near", None])
def test_rows_that_have_ended_are_left_alone(pair, plain, prompts, draft):
    """Row 0 ends after two tokens, the others run on."""
    target, calls = pair().target, []
    text = plain(target, prompts[0], 14)[0]

    def watch(row, tokens, logits):
        calls.append(row)
        return logits

    result = sm.generate(
        target, prompts, draft=pair().drafts.get(draft), lookahead=2, max_new_tokens=14,
        stop_token_ids=(text[2],), logits_processor=watch,
    )  # fmt: skip
    ends = [len(sequence) - len(given) for sequence, given in zip(result.sequences, prompts, strict=True)]
    assert ends[0] <= 2 < max(ends)
    per_round = 1 if draft is None else 5  # a round shows each position to the draft and to the target
    assert calls.count(0) <= ends[0] * per_round
    last = max(at for at, row in enumerate(calls) if row == 0)
    assert set(calls[last + 1 :]) <= {1, 2} and len(calls) - last > 8


ENDS = {
    "stop token": {"stop_token_ids": (9,)},
    "stop string": {"stop_strings": ["89"]},
    "budget": {"max_new_tokens": 6},
    "stop string within a token": {"stop_strings": ["9"]},
}


class Grammar:
    """Knows texts up to 9 alone: what comes after it is an error, as in parsers."""

    def __init__(self):
        self.asked = 0

    def __call__(self, row, tokens, logits):
        self.asked += 1
        if 9 in tokens:
            raise RuntimeError(f"the text has ended: {tokens}")
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([(tokens[-1] + 1) % 20]), 0.0)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("draft", ["scripted", "model", "ngram", None])
def test_it_is_not_asked_what_comes_behind_the_end(chain, ends, draft):
    """The text is 3 4 5 6 7 8 9; the second row gets there three tokens later and has to stop there, too."""
    target = chain([str(token).encode() for token in range(20)])
    drafts = {
        "scripted": ScriptedDraft(
            [[token % 20 for token in range(first, 60)] for first in (3, 0)], 20, lambda r, at: True
        ),
        "model": TableModel(torch.eye(20).roll(1, 1) + 1e-3),
    }
    options = {"max_new_tokens": 60, "stop_token_ids": (), **ENDS[ends]}
    for prompts in ([[3]], [[3], [0, 1, 2, 3]], [[7]]):
        if ends == "budget":
            prompts = [[3], [3]]
        for lookahead in (1, 4, 15, "auto"):
            for sampling in SAMPLING.values():
                grammar = Grammar()
                result = sm.generate(
                    target, prompts, draft=drafts.get(draft, draft), lookahead=lookahead, logits_processor=grammar,
                    sampling=sampling, **options,
                )  # fmt: skip
                for given, text in zip(prompts, result.sequences, strict=True):
                    assert text.tolist() == given + list(range(given[-1] + 1, 10))
                assert grammar.asked > 0 and set(result.finish_reasons) <= {"eos", "stop", "length"}


@pytest.mark.parametrize(
    "returned",
    [
        None,
        1.0,
        [0.0] * 61,
        torch.zeros(60),
        torch.zeros(1, 61),
        torch.zeros(()),
    ],
    ids=["None", "number", "list", "short", "two dimensions", "scalar"],
)
@pytest.mark.parametrize("draft", ["near", None])
def test_what_it_returns_must_be_logits(pair, prompts, draft, returned):
    with pytest.raises(ValueError, match="logits_processor") as caught:
        sm.generate(
            pair().target, prompts, draft=pair().drafts.get(draft),
            logits_processor=lambda row, tokens, logits: returned,
        )  # fmt: skip
    assert "\n" not in str(caught.value) and "(61,)" in str(caught.value)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("draft", ["near", None])
def test_logits_that_leave_no_choice(pair, prompts, draft, value):
    for sampling in SAMPLING.values():
        with pytest.raises(ValueError, match="row 0") as caught:
            sm.generate(
                pair().target, prompts, draft=pair().drafts.get(draft), sampling=sampling,
                logits_processor=lambda row, tokens, logits: logits.fill_(value),
            )  # fmt: skip
        assert "\n" not in str(caught.value)
