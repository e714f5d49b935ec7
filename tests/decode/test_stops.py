"""Guarantee 5: end-of-text tokens, stop strings and budgets cut inside a block, and everything ends there."""

import json
from pathlib import Path

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.models.text import TextStream
from speculative_mamba.testing.models import TableModel
from speculative_mamba.testing.scripted import ScriptedDraft

AGREE = {"none": lambda row, at: False, "all": lambda row, at: True, "half": lambda row, at: at % 2 == 0}
PIECES = [b"He", b"llo", b", ", b"w\xc3", b"\xb6rl", b"d ", b"\xe6\x97", b"\xa5", b"\xe6\x9c\xac", b"!", b"\n", b"End"]
TEXT = b"".join(PIECES).decode()


def ring(count=40):
    """Token i is followed by i+1."""
    return TableModel(torch.eye(count).roll(1, dims=1))


def chained(start, count, size=40):
    return [(start + i) % size for i in range(count)]


def run(model, prompts, agree="all", size=40, **options):
    """Speculation from a scripted draft; the stream and the statistics are checked against the result every time."""
    log, rounds, options = [], [], {"stop_token_ids": (), **options}
    draft = ScriptedDraft([chained(prompt[0], 60, size) for prompt in prompts], size, AGREE.get(agree, agree))
    result = sm.generate(
        model, prompts, draft=draft, on_token=lambda row, token: log.append((row, token)), on_commit=rounds.append,
        **options,
    )  # fmt: skip
    new = [sequence.tolist()[len(prompt) :] for sequence, prompt in zip(result.sequences, prompts, strict=True)]
    for row, tokens in enumerate(new):
        assert [token for r, token in log if r == row] == tokens, "the stream is the text"
    stats, committed = result.stats, [token for tokens in rounds for token in tokens]
    assert [(row, token) for row, token, _ in committed] == log and len(rounds) == stats.rounds
    assert sum(token.drafted for token in committed) == stats.accepted
    assert stats.tokens == len(log) == sum(map(len, new))
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.accepted <= stats.tested <= stats.drafted
    assert sum(stats.accepted_per_position) == stats.accepted
    assert sum(stats.tested_per_position) == stats.tested
    assert stats.accepted <= stats.tokens <= stats.accepted + stats.row_rounds
    return new, result, log


@pytest.mark.parametrize("agree", AGREE)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_exact_budget(pair, plain, prompt, agree, length):
    """Catches: a budget off by one."""
    target = pair().target
    text = plain(target, prompt(length), 30)[0]
    for lookahead in range(1, 9):
        for budget in range(13):
            draft = ScriptedDraft([text], target.vocab_size, AGREE[agree])
            result = sm.generate(
                target, [prompt(length)], draft=draft, lookahead=lookahead, max_new_tokens=budget, stop_token_ids=()
            )
            assert result.sequences[0].tolist() == text[: length + budget], f"K {lookahead}, budget {budget}"
            assert result.finish_reasons == ["length"] and result.stats.tokens == budget


@pytest.mark.parametrize("budget", range(4))
def test_exact_budget_without_a_draft(pair, prompt, budget):
    result = sm.generate(pair().target, [prompt(3), prompt(1)], max_new_tokens=budget, stop_token_ids=())
    assert [len(sequence) for sequence in result.sequences] == [3 + budget, 1 + budget]
    assert result.stats.tokens == 2 * budget and result.stats.rounds == budget


def test_budget_zero_gives_the_prompts_back(pair, prompt):
    result = sm.generate(pair().target, [prompt(3), prompt(5)], max_new_tokens=0, output_logits=True)
    assert [sequence.tolist() for sequence in result.sequences] == [prompt(3), prompt(5)]
    assert [tuple(logits.shape) for logits in result.logits] == [(0, 61)] * 2
    stats = result.stats.as_dict()
    assert stats["rounds"] == stats["tokens"] == 0
    assert stats["acceptance_rate"] is stats["tokens_per_s"] is stats["tokens_per_round"] is None


@pytest.mark.parametrize("lookahead", [1, 4, 7])
@pytest.mark.parametrize("agree", AGREE)
@pytest.mark.parametrize("position", range(1, 13))
def test_end_of_text_at_every_position(agree, position, lookahead):
    """Catches: an end of text inside the block missed; statistics past the stop."""
    new, result, _ = run(
        ring(), [[3]], agree, lookahead=lookahead, max_new_tokens=20, stop_token_ids=(3 + position,), output_logits=True
    )
    assert new == [chained(4, position)]
    assert result.finish_reasons == ["eos"] and len(result.logits[0]) == position


def test_nothing_behind_the_end_of_text_is_counted():
    """Drafted 4 5 6 7, all right; 5 ends the text: two tokens tested, two accepted."""
    _, result, _ = run(ring(), [[3]], lookahead=4, max_new_tokens=20, stop_token_ids=(5,))
    stats = result.stats
    assert (stats.rounds, stats.drafted, stats.tested, stats.accepted, stats.tokens) == (1, 4, 2, 2, 2)
    assert stats.accepted_per_position == [1, 1, 0, 0] and stats.acceptance_rate == 1


def test_the_first_of_several_stop_tokens_counts():
    new, result, _ = run(ring(), [[3]], lookahead=6, max_new_tokens=20, stop_token_ids=(9, 6, 30))
    assert new == [[4, 5, 6]] and result.finish_reasons == ["eos"]


def test_a_stop_token_in_the_prompt_does_not_stop():
    new, _, _ = run(ring(), [[3, 4, 5]], lookahead=3, max_new_tokens=4, stop_token_ids=(3, 5))
    assert new == [[6, 7, 8, 9]]


def test_the_models_own_end_of_text_is_the_default():
    model = ring()
    model.eos_token_id = 6
    assert run(model, [[3]], stop_token_ids=None)[0] == [[4, 5, 6]]
    assert run(model, [[3]], stop_token_ids=(), max_new_tokens=5)[0] == [[4, 5, 6, 7, 8]]


def test_an_end_of_text_as_last_token_of_the_budget():
    _, result, _ = run(ring(), [[3]], max_new_tokens=3, stop_token_ids=(6,))
    assert result.finish_reasons == ["eos"]


@pytest.mark.parametrize("agree", AGREE)
def test_rows_end_on_their_own(agree):
    """Token 12 ends rows after 1, 6 and 11 tokens; the fourth starts behind it and runs to its budget."""
    prompts = [[11], [6], [1], [13]]
    new, result, log = run(ring(), prompts, agree, lookahead=3, max_new_tokens=15, stop_token_ids=(12,))
    assert new == [chained(p[0] + 1, n) for p, n in zip(prompts, (1, 6, 11, 15), strict=True)]
    assert result.finish_reasons == ["eos", "eos", "eos", "length"]
    assert [token for row, token in log if row == 0] == [12], "a row that has ended is silent"
    alone = [run(ring(), [p], agree, lookahead=3, max_new_tokens=15, stop_token_ids=(12,))[1].stats for p in prompts]
    assert result.stats.rounds == max(stats.rounds for stats in alone)
    assert result.stats.row_rounds == sum(stats.rounds for stats in alone)


@pytest.mark.parametrize("lookahead", [1, 4, 9])
@pytest.mark.parametrize(
    ("stops", "last", "shown"),
    [
        (["l"], 1, ""),  # inside a token
        ([", "], 2, "llo"),
        (["lo, w"], 4, "l"),  # across four tokens; a character is seen with its last byte, and "w" with it
        (["ö"], 4, "llo, w"),  # a character whose bytes lie in two tokens
        (["日"], 7, "llo, wörld "),
        (["本"], 8, "llo, wörld 日"),
        (["d 日本!"], 9, "llo, wörl"),
        (["End"], 11, "llo, wörld 日本!\n"),
        (["\n"], 10, "llo, wörld 日本!"),
        (["日本", "rl", "?"], 4, "llo, wö"),  # the first to appear counts
        (["o, x", "o, "], 2, "ll"),  # one that starts like another
    ],
)
def test_stop_strings(chain, stops, last, shown, lookahead):
    model, size = chain(PIECES), len(PIECES)
    new, result, log = run(model, [[0]], size=size, lookahead=lookahead, max_new_tokens=11, stop_strings=stops)
    assert new == [list(range(1, last + 1))], "the row ends with the token that completes the stop string"
    assert result.finish_reasons == ["stop"]
    assert result.stats.tested <= last
    plainly = sm.generate(model, [[0]], max_new_tokens=11, stop_strings=stops)
    assert torch.equal(plainly.sequences[0], result.sequences[0])
    stream = TextStream(model.tokenizer, stops)
    pieces = [stream.push(token) for _, token in log]
    assert "".join(pieces) + stream.finish() == shown, "the text ends before the stop string"


@pytest.mark.parametrize("lookahead", [1, 4])
def test_of_several_reasons_at_one_token(chain, lookahead):
    """A stop token comes before a stop string, and that before the budget."""
    model, options = chain(PIECES), {"size": len(PIECES), "lookahead": lookahead, "stop_strings": ["rl"]}
    for stops, budget, reason in (((4,), 4, "eos"), ((4,), 9, "eos"), ((), 4, "stop"), ((6,), 9, "stop")):
        new, result, _ = run(model, [[0]], max_new_tokens=budget, stop_token_ids=stops, **options)
        assert new == [[1, 2, 3, 4]] and result.finish_reasons == [reason]


def test_a_stop_string_that_never_comes(chain):
    model, size = chain(PIECES), len(PIECES)
    stops = ["world", "Hello", "日本?", "llo,x"]  # "Hello" is half in the prompt
    new, result, log = run(model, [[0]], size=size, max_new_tokens=11, stop_strings=stops)
    assert len(new[0]) == 11 and result.finish_reasons == ["length"]
    stream = TextStream(model.tokenizer, stops)
    pieces = [stream.push(token) for _, token in log]
    assert "".join(pieces) + stream.finish() == TEXT.removeprefix("He")


def test_stop_strings_of_one_row_leave_the_others_alone(chain):
    model, size = chain(PIECES), len(PIECES)
    new, result, _ = run(model, [[0], [4]], size=size, lookahead=2, max_new_tokens=7, stop_strings=["rl"])
    assert new == [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]] and result.finish_reasons == ["stop", "length"]


def test_text_is_shown_in_whole_characters(chain):
    model = chain(PIECES)
    stream = TextStream(model.tokenizer)
    pieces = [stream.push(token) for token in range(len(PIECES))]
    assert "".join(pieces) + stream.finish() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_that_ends_within_a_character(chain):
    """One token holds a whole character and the start of another: the text is what decoding all tokens gives."""
    tokenizer = chain(PIECES).tokenizer
    stream = TextStream(tokenizer, ["End"])
    shown = "".join(stream.push(token) for token in range(4))
    assert shown + stream.finish() == tokenizer.decode([0, 1, 2, 3]) == "Hello, w\ufffd"


def test_counts_by_hand():
    """K = 3, budget 9. A window's wrong tokens are those at 3, 4 and 9 of the text, prompt included.

    round 1: drafts at 1 2 3 → 2 accepted, 3 tested, text to 3; round 2: 4 5 6 → 0 accepted, 1 tested, text to 4;
    round 3: 5 6 7 → all, text to 8; round 4: one token is left of the budget, nothing is drafted, text to 9.
    """
    _, result, log = run(ring(), [[0]], lambda row, at: at not in (3, 4, 9), lookahead=3, max_new_tokens=9)
    stats = result.stats
    assert log == [(0, token) for token in range(1, 10)]
    assert (stats.rounds, stats.row_rounds, stats.tokens) == (4, 4, 9)
    assert (stats.drafted, stats.tested, stats.accepted) == (9, 7, 5)
    assert stats.tested_per_position == [3, 2, 2] and stats.accepted_per_position == [2, 2, 1]
    assert stats.acceptance_rate == 5 / 7 and stats.tokens_per_round == 9 / 4
    assert stats.tokens == stats.accepted + stats.row_rounds
    as_dict = json.loads(json.dumps(stats.as_dict()))
    assert as_dict["acceptance_rate"] == 5 / 7 and as_dict["tokens_per_s"] == stats.tokens / stats.decode_s


@pytest.mark.parametrize("lookahead", [1, 3, 8])
@pytest.mark.parametrize("stop", [9, 20, 39])
def test_a_batch_counted_by_hand(lookahead, stop):
    """Four rows that accept by patterns of their own: every counter equals a count over the script, and row by row
    the text is that of the row alone. A row that has ended is silent."""
    prompts, budget = [[0], [5, 6], [11], [17, 18, 19]], 14
    patterns = ((1, 1, 0), (0,), (1,), (1, 0, 1, 1, 1, 0))
    new, result, log = run(
        ring(), prompts, lambda row, at: patterns[row][at % len(patterns[row])], lookahead=lookahead,
        max_new_tokens=budget, stop_token_ids=(stop,),
    )  # fmt: skip
    drafted = rounds = row_rounds = cut = 0
    tested, accepted, position = [0] * lookahead, [0] * lookahead, [len(p) for p in prompts]
    ends = [len(p) + len(tokens) for p, tokens in zip(prompts, new, strict=True)]
    expected_log = []
    while active := [row for row in range(4) if position[row] < ends[row]]:
        rounds += 1
        for row in active:
            drafts = min(lookahead, budget + len(prompts[row]) - position[row] - 1)
            row_rounds, drafted = row_rounds + 1, drafted + drafts
            for at in range(drafts + 1):
                right = at < drafts and patterns[row][position[row] % len(patterns[row])]
                if at < drafts:
                    tested[at], accepted[at] = tested[at] + 1, accepted[at] + right
                expected_log.append((row, prompts[row][0] + position[row]))
                position[row] += 1
                cut += right and position[row] == ends[row]
                if not right or position[row] == ends[row]:
                    break
    stats = result.stats
    assert log == expected_log
    assert (stats.rounds, stats.row_rounds, stats.drafted) == (rounds, row_rounds, drafted)
    assert stats.tested_per_position == tested and stats.accepted_per_position == accepted
    assert stats.tokens == stats.accepted + stats.row_rounds - cut, "a cut block lacks the target's own token"
    for row, prompt in enumerate(prompts):
        pattern = patterns[row]
        alone = run(
            ring(), [prompt], lambda _, at, pattern=pattern: pattern[at % len(pattern)], lookahead=lookahead,
            max_new_tokens=budget, stop_token_ids=(stop,),
        )  # fmt: skip
        assert alone[0][0] == new[row] and alone[1].finish_reasons[0] == result.finish_reasons[row]


@pytest.mark.parametrize("budget", [1, 2, 9])
def test_statistics_without_a_draft(budget):
    result = sm.generate(ring(), [[0], [7]], max_new_tokens=budget, stop_token_ids=())
    stats = result.stats
    assert (stats.rounds, stats.row_rounds, stats.tokens, stats.tokens_per_round) == (budget, 2 * budget, 2 * budget, 1)
    assert stats.drafted == stats.tested == stats.accepted == 0 and stats.draft_s < stats.verify_s
    assert stats.tested_per_position == stats.accepted_per_position == []


def test_times(pair, prompt):
    models = pair()
    stats = sm.generate(models.target, [prompt(200)], draft=models.drafts["near"], max_new_tokens=10).stats
    assert stats.prefill_s > 0 and stats.draft_s > 0 and stats.verify_s > 0
    assert stats.draft_s + stats.verify_s <= stats.decode_s


def test_peak_memory():
    """Of the process, as the kernel counts it.

    Catches: kilobytes taken for bytes."""

    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    before, measured = peak(), sm.generate(ring(), [[0]], max_new_tokens=1).stats.peak_bytes
    assert before - 2**20 <= measured <= peak() + 2**20  # the kernel counts in steps


@pytest.mark.parametrize("agree", AGREE)
def test_which_tokens_came_from_the_draft(agree):
    """Those that agree, up to the first that does not; never the one after them, nor the last of a budget."""
    commits, draft = [], ScriptedDraft([chained(0, 60), chained(7, 60)], 40, AGREE[agree])
    sm.generate(
        ring(), [[0], [7, 8]], draft=draft, lookahead=3, max_new_tokens=9, stop_token_ids=(), on_commit=commits.append
    )
    lengths = [1, 2]
    for tokens in commits:
        for row in sorted({token.row for token in tokens}):
            drafted = [token.drafted for token in tokens if token.row == row]
            for at, came in enumerate(drafted):
                position = lengths[row] + at
                stands = AGREE[agree](row, position) and at < 3 and position < 9 + row
                assert came == (stands and all(drafted[:at]))
            lengths[row] += len(drafted)
    assert lengths == [10, 11]


def test_what_on_token_raises_reaches_the_caller(pair, prompt):
    def interrupt(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.generate(pair().target, [prompt(3)], on_token=interrupt)
