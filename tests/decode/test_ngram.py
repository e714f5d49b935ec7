"""The text so far as the draft: which tokens it proposes, and that it changes nothing but the speed."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speculative_mamba as sm
from speculative_mamba.decode import NgramDrafter
from speculative_mamba.decode.lookahead import AUTO_AT_MOST, AUTO_LOOKAHEADS, AdaptiveLookahead, FixedLookahead
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.tolerance import assert_bitwise_equal

PERIOD = [7, 3, 50, 12, 7, 9]
PROMPTS = {
    "one token": [5],
    "two equal tokens": [5, 5],
    "one token many times": [5] * 20,
    "a period": PERIOD * 4,
    "a period cut off": (PERIOD * 4)[:-2],
    "no token twice": list(range(40)),
    "twice the same, then a third beginning": [*range(20), 60, *range(20), 60, *range(4)],
}


def proposals(prompt, lookahead=4, **options):
    """What is proposed after a single prompt."""
    drafter = NgramDrafter(61, **options)
    drafter.begin([prompt], lookahead, None)
    tokens, probs = drafter.propose([prompt], torch.zeros(1, dtype=torch.int32), lookahead)
    assert probs is None and tokens.dtype == torch.int64 and len(tokens) == 1
    return tokens[0].tolist()


@pytest.mark.parametrize(
    ("prompt", "longest", "shortest", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 9, 1, 2], 3, 2, [3, 4, 5, 6]),
        ([1, 2, 3, 4, 5, 6, 9, 1, 2], 3, 3, []),
        ([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 3, 3, [4, 5, 6, 9]),
        ([1, 2, 8, 8, 8, 9, 1, 2, 7, 7, 7, 7, 1, 2], 2, 2, [7, 7, 7, 7]),
        ([0, 1, 2, 8, 8, 8, 9, 1, 2, 7, 7, 7, 7, 0, 1, 2], 3, 2, [8, 8, 8, 9]),
        ([0, 1, 2, 8, 8, 8, 9, 1, 2, 7, 7, 7, 7, 0, 1, 2], 2, 2, [7, 7, 7, 7]),
        ([4, 1, 9, 2, 1], 1, 1, [9, 2, 1, 9]),
        ([4, 1, 9, 2, 3], 1, 1, []),
        ([6, 1, 2, 3, 1, 2, 3], 3, 2, [1, 2, 3, 1]),
        ([6, 6, 6], 2, 2, [6, 6, 6, 6]),
        ([6, 6], 2, 2, []),
        ([6, 6], 2, 1, [6, 6, 6, 6]),
        ([6], 1, 1, []),
        ([1, 2, 3, 1, 2], 99, 1, [3, 1, 2, 3]),
    ],
    ids=[
        "two tokens", "two are too few", "three tokens", "the most recent", "a longer match before a recent one",
        "recent when longer ones are not looked for", "one token", "no match", "a period goes on",
        "the shortest period", "not with itself", "a token twice", "nothing before it", "longer than the text",
    ],
)  # fmt: skip
def test_proposals_by_hand(prompt, longest, shortest, expected):
    """Catches: `longest` or `shortest` one off."""
    assert proposals(prompt, longest=longest, shortest=shortest) == expected


@pytest.mark.parametrize("lookahead", range(1, 16))
def test_a_match_always_gives_as_many_tokens_as_asked_for(lookahead):
    assert proposals([9, 8, 1, 2, 3, 1, 2], lookahead, shortest=2) == ([3, 1, 2] * 5)[:lookahead]


def by_brute_force(text, lookahead, longest, shortest):
    """Looks at every place in the text, and copies token by token."""
    for length in range(min(longest, len(text) - 1), shortest - 1, -1):
        ends = [end for end in range(length, len(text)) if text[end - length : end] == text[-length:]]
        if ends:
            grown = list(text)
            for _ in range(lookahead):
                grown.append(grown[ends[-1] + len(grown) - len(text)])
            return grown[len(text) :]
    return []


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=3),
    growth=st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.booleans()), max_size=12),
    lookahead=st.integers(1, 6),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_the_index_is_a_search_of_the_whole_text(prompts, growth, lookahead, lengths):
    """Texts that grow by several tokens a round, each row by its own, and rounds in which nobody asks.

    Catches: an earlier place instead of the most recent; the shortest match first; a suffix found at itself.
    """
    shortest, longest = sorted(lengths)
    drafter = NgramDrafter(3, longest=longest, shortest=shortest)
    drafter.begin([list(prompt) for prompt in prompts], lookahead, None)
    rows, counts = [list(prompt) for prompt in prompts], torch.zeros(len(prompts), dtype=torch.int32)
    for tokens, asked in [([], True), *growth]:
        for number, row in enumerate(rows):
            row.extend(token * (1 + number) % 3 for token in tokens[number % 2 :] or tokens)
        if not asked:
            continue
        expected = [by_brute_force(row, lookahead, longest, shortest) for row in rows]
        filled = [one or [row[-1]] * lookahead for one, row in zip(expected, rows, strict=True)]
        found = drafter.propose(rows, counts, lookahead)[0]
        assert found.tolist() == (filled if any(expected) else [[]] * len(rows))


def test_each_token_is_read_once():
    """However long the text, a round costs what it added. Catches: the text read again in every round."""

    class Watched(list):
        read = 0

        def __getitem__(self, at):
            got = super().__getitem__(at)
            Watched.read += len(got) if isinstance(at, slice) else 1
            return got

    text = Watched([1, 2, 3] * 500)
    drafter = NgramDrafter(61)
    drafter.begin([[*text]], 4, None)
    for _ in range(5):
        text.extend([4, 5])
        drafter.propose([text], torch.zeros(1, dtype=torch.int32), 4)
    assert Watched.read <= 5 * (2 + 4)


def test_a_new_batch_forgets_the_old_one():
    drafter, none = NgramDrafter(61, shortest=1), torch.zeros(1, dtype=torch.int32)
    for text, expected in ([1, 2, 3, 1], [2, 3]), ([4, 2, 1], []), ([9, 1], []):
        drafter.begin([text], 2, None)
        assert drafter.propose([text], none, 2)[0].tolist() == [expected]


def test_a_row_whose_next_text_is_being_read_asks_for_nothing():
    """Its index is still that of a longer text."""
    drafter, none = NgramDrafter(61), torch.zeros(2, dtype=torch.int32)
    drafter.begin([[1, 2] * 4 + [1], [5, 6, 5]], 2, None)
    for text in ([3] * 5, [3] * 8):
        assert drafter.propose([text, [5, 6, 5]], none, 2)[0].shape == (2, 0)
        assert drafter.counts == [0, 0]
    drafter.restart(0, [3] * 9)
    assert drafter.propose([[3] * 9, [5, 6, 5]], none, 2)[0].tolist() == [[3, 3], [5, 5]]


def test_rows_of_a_batch():
    """Without a match a row repeats its last token beside a row with one; a row that has ended asks for nothing."""
    drafter, none = NgramDrafter(61, longest=3, shortest=2), torch.zeros(3, dtype=torch.int32)
    rows = [[1, 2, 3, 1, 2], [4, 5, 6], [8]]
    drafter.begin(rows, 3, None)
    assert drafter.propose(rows, none, 3)[0].tolist() == [[3, 1, 2], [6, 6, 6], [8, 8, 8]]
    rows[1] += [4, 5]
    assert drafter.propose(rows, none, 2)[0].tolist() == [[2, 2], [6, 4], [8, 8]], "row 0 has not grown"
    rows[2] += [9]
    assert drafter.propose(rows, none, 2)[0].shape == (3, 0), "row 0 alone would have a match"


@pytest.mark.parametrize(
    ("longest", "shortest"),
    [(3, 4), (0, 0), (3, 0), (3, -1), (-1, -2), (3.0, 2), (3, 2.0), ("3", 2), (3, None), (True, 1), (float("nan"), 1)],
    ids=str,
)
def test_lengths_that_make_no_sense(longest, shortest):
    with pytest.raises(ValueError, match="1 <= shortest <= longest") as caught:
        NgramDrafter(61, longest=longest, shortest=shortest)
    assert repr(longest) in str(caught.value) and "\n" not in str(caught.value)


def test_drafts_by_name(pair, prompt):
    with pytest.raises(ValueError, match=r"'trigram'.*ngram"):
        sm.generate(pair().target, [prompt(3)], draft="trigram")
    with pytest.raises(ValueError, match="target must be a model"):
        sm.generate(None, [prompt(3)], draft="ngram")
    with pytest.raises(ValueError, match="different vocabularies"):
        sm.generate(pair().target, [prompt(3)], draft=NgramDrafter(60))
    named, made = (
        sm.generate(pair().target, [PERIOD * 3], draft=draft, stop_token_ids=(), max_new_tokens=20).stats
        for draft in ("ngram", sm.NgramDrafter(61))
    )
    counts = ("rounds", "drafted", "tested", "accepted", "tested_per_position", "accepted_per_position")
    assert [getattr(named, name) for name in counts] == [getattr(made, name) for name in counts]
    assert named.drafted > 0


@pytest.fixture
def looping():
    """After token t comes token t+1, and 0 after the last of eleven: a text that repeats itself."""
    return TableModel(torch.eye(11).roll(1, dims=1))


@pytest.mark.parametrize(
    ("backend", "lookahead"), [*(("cpu", k) for k in range(1, 9)), *(("reference", k) for k in (2, 7))]
)
def test_greedy_text_and_logits_are_those_of_plain_decoding(pair, plain, lookahead, backend):
    """Single tokens count as matches here, so that there are many proposals, right and wrong."""
    target, drafter = pair(backend=backend).target, NgramDrafter(61, shortest=1)
    options = {"draft": drafter, "lookahead": lookahead, "max_new_tokens": 20, "stop_token_ids": ()}
    drafted = 0
    for batch in [[prompt] for prompt in PROMPTS.values()] + [[*PROMPTS.values()]]:
        result = sm.generate(target, batch, output_logits=True, **options)
        for row, prompt in enumerate(batch):
            sequence, logits = plain(target, prompt, 20)
            assert result.sequences[row].tolist() == sequence
            assert_bitwise_equal(result.logits[row], logits)
        drafted += result.stats.drafted
    assert drafted > 0


def test_a_text_that_repeats_itself_by_hand(looping):
    """One token a round, until the first two of the second time round are there; from then on every draft is right."""
    result = sm.generate(looping, [[0]], draft=NgramDrafter(11, shortest=2), lookahead=4, max_new_tokens=32)
    assert result.sequences[0].tolist() == [token % 11 for token in range(33)]
    stats = result.stats
    # 12 rounds give tokens 1, …, 12, of which the last two are 0, 1; then 4 rounds of five tokens.
    assert (stats.tokens, stats.rounds, stats.row_rounds) == (32, 16, 16)
    assert (stats.drafted, stats.tested, stats.accepted) == (16, 16, 16)
    assert stats.tested_per_position == stats.accepted_per_position == [4] * 4


def test_rounds_without_a_proposal_are_counted_as_plain_ones(pair, plain):
    no_match = PROMPTS["no token twice"]
    result = sm.generate(pair().target, [no_match], draft=NgramDrafter(61, longest=50, shortest=40), max_new_tokens=9,
                         stop_token_ids=())  # fmt: skip
    assert result.sequences[0].tolist() == plain(pair().target, no_match, 9)[0]
    stats = result.stats
    assert (stats.rounds, stats.row_rounds, stats.tokens) == (9, 9, 9)
    assert stats.drafted == stats.tested == stats.accepted == 0 and stats.acceptance_rate is None
    assert stats.tested_per_position == [0] * 4 and stats.tokens_per_round == 1


def test_rows_with_and_without_a_match_in_one_batch(looping):
    """The counts of each row are its own; the second finds its first match when the other has ended.

    Catches: rows that have ended and keep proposing.
    """
    prompts = [[*range(11), 0, 1], [3]]
    together = sm.generate(looping, prompts, draft=NgramDrafter(11, shortest=2), lookahead=4, max_new_tokens=25)
    for prompt, sequence in zip(prompts, together.sequences, strict=True):
        assert sequence.tolist() == [(prompt[0] + step) % 11 for step in range(len(prompt) + 25)]
    # The first row: five rounds of five tokens. Meanwhile nothing counts of what the second row is given. After 12
    # tokens it can copy the other 13: 5, 5 and 3.
    stats = together.stats
    assert (stats.rounds, stats.row_rounds) == (12 + 3, 5 + 12 + 3)
    assert stats.drafted == stats.tested == stats.accepted == 5 * 4 + (4 + 4 + 2)


@pytest.mark.parametrize("stop", range(11))
@pytest.mark.parametrize("lookahead", [1, 3, 4, 8])
def test_a_stop_inside_a_copied_block(looping, stop, lookahead):
    prompt = [*range(11), 0, 1]
    result = sm.generate(looping, [prompt], draft="ngram", lookahead=lookahead, stop_token_ids=(stop,))
    assert result.finish_reasons == ["eos"]
    assert result.sequences[0].tolist() == prompt + [token % 11 for token in range(2, 2 + (stop - 2) % 11 + 1)]
    assert result.stats.tokens == (stop - 2) % 11 + 1 >= result.stats.accepted


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 5, 6, 17])
@pytest.mark.parametrize("lookahead", [4, 15, "auto"])
def test_exact_budget(looping, budget, lookahead):
    result = sm.generate(looping, [[*range(11), 0, 1]], draft="ngram", lookahead=lookahead, max_new_tokens=budget)
    assert result.sequences[0].tolist() == [token % 11 for token in range(13 + budget)]


SAMPLED = {
    "greedy": sm.SamplingParams(),
    "cold": sm.SamplingParams(temperature=0.3, seed=2),
    "filtered": sm.SamplingParams(temperature=0.9, top_k=7, top_p=0.9, min_p=0.02, seed=3),
    "penalty": sm.SamplingParams(temperature=0.7, repetition_penalty=1.2, seed=4),
}


@pytest.mark.parametrize("lookahead", [1, 4, 11, "auto"])
@pytest.mark.parametrize("sampling", SAMPLED)
def test_coupled_text_is_that_of_plain_sampling(pair, sampling, lookahead):
    options = {"sampling": SAMPLED[sampling], "acceptance": "coupled", "max_new_tokens": 30, "stop_token_ids": ()}
    prompts = list(PROMPTS.values())
    plainly = sm.generate(pair().target, prompts, **options)
    drafter = NgramDrafter(61, shortest=1)
    result = sm.generate(pair().target, prompts, draft=drafter, lookahead=lookahead, **options)
    for mine, theirs in zip(result.sequences, plainly.sequences, strict=True):
        assert torch.equal(mine, theirs)
    assert result.stats.drafted > 0


@pytest.mark.parametrize("parts", [(1, 1, 1, 37), (13, 0, 27), (20, 20)], ids=str)
def test_going_on_with_a_cache(pair, plain, assert_states_fit, parts):
    """Nothing of the draft is kept: it reads the text again."""
    target, cache, current = pair().target, sm.GenerationCache(), list(PROMPTS.values())
    for budget in parts:
        result = sm.generate(
            target, current, draft=NgramDrafter(61, shortest=1), lookahead=4, max_new_tokens=budget,
            stop_token_ids=(), cache=cache,
        )  # fmt: skip
        current = cache.sequences
    assert result.stats.drafted > 0
    for sequence, prompt in zip(current, PROMPTS.values(), strict=True):
        assert sequence == plain(target, prompt, sum(parts))[0]
    assert_states_fit(cache)
    assert cache.draft_states == [None] * len(current)


def test_after_a_continuation_the_whole_text_counts(looping):
    cache = sm.GenerationCache()
    sm.generate(looping, [[0]], max_new_tokens=12, cache=cache)
    stats = sm.generate(looping, cache.sequences, draft="ngram", lookahead=4, max_new_tokens=20, cache=cache).stats
    assert stats.rounds == 4 + (NgramDrafter(11).shortest > 2) and stats.accepted == stats.tested


@pytest.mark.parametrize("pattern", [(0, 4), (2, 0, 0, 3), (0, 0, 0, 5, 1)], ids=str)
def test_rounds_in_which_it_is_not_asked(pair, plain, looping, monkeypatch, pattern):
    for target, prompt in (looping, [0]), (pair().target, PROMPTS["a period"]):
        expected = plain(target, prompt, 40)[0]
        rounds = iter(pattern * 40)
        monkeypatch.setattr(FixedLookahead, "next", functools.partial(next, rounds))
        result = sm.generate(target, [prompt], draft=NgramDrafter(target.vocab_size, shortest=1), lookahead=5,
                             max_new_tokens=40, stop_token_ids=())  # fmt: skip
        assert result.sequences[0].tolist() == expected and result.stats.drafted > 0
        monkeypatch.undo()


def observed(chooser, drafts, accepted, seconds):
    chooser.observe(drafts, min(accepted + 1, drafts), accepted, seconds)


def test_auto_goes_on_asking_while_nothing_is_proposed():
    """Rounds without a proposal say nothing about the draft: not that it is wrong, nor what it costs.

    Catches: a round without a proposal taken for a wrong draft.
    """
    chooser = AdaptiveLookahead(AUTO_LOOKAHEADS)
    for number in range(500):
        assert chooser.next() >= 1 or number < 3
        observed(chooser, 0, 0, 1.0)
    for _ in range(6):
        drafts = chooser.next()
        observed(chooser, drafts, drafts, 1 + 0.05 * drafts)
        observed(chooser, 0, 0, 1.0)
    assert chooser.next() == AUTO_AT_MOST, "always right and almost free"


@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_auto_judges_by_the_rounds_with_a_proposal(rate):
    """One round in ten has a match; a draft that is wrong is given up, one that is right is not.

    Catches: a round without a proposal taken for a slow draft.
    """
    chooser, chosen = AdaptiveLookahead(AUTO_LOOKAHEADS), []
    for number in range(1500):
        drafts = chooser.next()
        chosen.append(drafts)
        drafts = drafts if number % 10 == 0 else 0
        observed(chooser, drafts, round(rate * drafts), 1 + 0.06 * drafts)
    assert chosen[-1] > 0 if rate else chosen[-100:] == [0] * 100


def test_auto_on_a_text_that_repeats_itself(looping):
    """The clock decides how much is drafted, not what comes out."""
    for budget in (1, 2, 14, 90):
        result = sm.generate(looping, [[0], [7]], draft="ngram", lookahead="auto", max_new_tokens=budget)
        for first, sequence in zip((0, 7), result.sequences, strict=True):
            assert sequence.tolist() == [(first + step) % 11 for step in range(1 + budget)]
        assert result.stats.accepted <= result.stats.tested
