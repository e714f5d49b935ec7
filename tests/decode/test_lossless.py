"""Guarantee 1: greedy decoding with a draft gives the tokens and logits of greedy decoding without, bit for bit."""

import dataclasses
import math

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import TableModel, random_model, tiny_config
from speculative_mamba.testing.scripted import ScriptedDraft, agree_at_rate
from speculative_mamba.testing.tolerance import assert_bitwise_equal

TOKENS = 12
UNEQUAL = (1, 2, 9, 33, 70)  # prompt lengths of one batch; 70 crosses a boundary of prefill's chunks


def scripted(texts, agree, vocabulary=61):
    return ScriptedDraft(texts, vocabulary, agree)


def check(target, draft, prompts, plain, lookahead, tokens=TOKENS):
    """Every row against plain decoding of that row alone."""
    result = sm.generate(
        target, prompts, draft=draft, lookahead=lookahead, max_new_tokens=tokens, stop_token_ids=(), output_logits=True
    )
    for row, prompt in enumerate(prompts):
        sequence, logits = plain(target, prompt, tokens)
        assert result.sequences[row].tolist() == sequence, f"tokens of row {row}"
        assert_bitwise_equal(result.logits[row], logits, f"logits of row {row}")
    return result


@pytest.mark.parametrize("lookahead", range(1, 9))
def test_every_prompt_length(pair, plain, prompt, lookahead):
    """Catches: drafted tokens compared one position off."""
    target = pair().target
    for length in range(1, 41):
        text = plain(target, prompt(length), TOKENS)[0]
        check(target, scripted([text], agree_at_rate(0.5, length)), [prompt(length)], plain, lookahead)


@pytest.mark.parametrize("lookahead", range(1, 9))
@pytest.mark.parametrize("draft", ["random", "near", "equal"])
def test_model_drafts(pair, plain, prompt, draft, lookahead):
    models = pair()
    prompts = [prompt(length) for length in UNEQUAL]
    together = check(models.target, models.drafts[draft], prompts, plain, lookahead)
    alone = [check(models.target, models.drafts[draft], [p], plain, lookahead).stats for p in prompts[:3]]
    if draft == "near":
        rates = [together.stats.acceptance_rate, *(stats.acceptance_rate for stats in alone)]
        assert any(0 < rate < 1 for rate in rates), "this draft should be right now and then"


@pytest.mark.parametrize("lookahead", range(1, 9))
@pytest.mark.parametrize("rate", [0, 0.5, 1])
def test_scripted_drafts(pair, plain, prompt, rate, lookahead):
    target = pair().target
    prompts = [prompt(length, seed=2) for length in UNEQUAL]
    texts = [plain(target, p, TOKENS)[0] for p in prompts]
    stats = check(target, scripted(texts, agree_at_rate(rate)), prompts, plain, lookahead).stats
    if rate != 0.5:
        assert stats.acceptance_rate == rate


def test_every_row_accepts_its_own_count(pair, plain, prompt):
    """Row r disagrees at every (r+2)-th position, the last row never."""
    target = pair().target
    prompts = [prompt(length, seed=3) for length in UNEQUAL]
    texts = [plain(target, p, 24)[0] for p in prompts]
    draft = scripted(texts, lambda row, position: row == 4 or position % (row + 2) != 0)
    check(target, draft, prompts, plain, lookahead=5, tokens=24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "q8_0", "q4_0"], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("draft", ["random", "near"])
def test_dtypes_and_backends(pair, plain, prompt, dtype, backend, draft):
    """Catches: a reference that multiplies all rows at once; a state not rounded between the tokens of a call."""
    models = pair(dtype, backend)
    prompts = [prompt(length) for length in (1, 4, 67)]
    for lookahead in (1, 4, 8) if backend == "cpu" else (3,):
        check(models.target, models.drafts[draft], prompts, plain, lookahead)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_state_dtypes(pair, plain, prompt, state_dtype, backend):
    """The state is rounded after every token, so a window, prefill and one token at a time still give the same bits.

    Catches: a state that is not rounded between the tokens of a call.
    """
    models = pair(backend=backend)
    target, near = (dataclasses.replace(m, state_dtype=state_dtype) for m in (models.target, models.drafts["near"]))
    assert target.new_cache(1, 2)[0].states.dtype == state_dtype
    prompts = [prompt(length) for length in (1, 4, 67)]
    for draft in (near, models.drafts["random"]):
        for lookahead in (1, 4, 8) if backend == "cpu" else (3,):
            check(target, draft, prompts, plain, lookahead)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_number_of_threads(threads, backend):
    """A model large enough to be shared out: any draft gives the plain text and logits with every number of threads.

    The C++ kernels also give the same bits whatever the number; PyTorch's matrix products do not promise that.
    """
    sizes = {"d_model": 200, "d_state": 16, "dt_rank": 13, "vocab_size": 1500, "tie_embeddings": False}
    target = random_model(tiny_config(**sizes), dtype=torch.bfloat16, backend=backend)
    draft = random_model(tiny_config(vocab_size=1500), seed=1, backend=backend)
    prompts = [[1, 2, 3], list(range(70 if backend == "cpu" else 20))]  # the reference takes one token after another
    options = {"lookahead": 3, "max_new_tokens": 8, "stop_token_ids": (), "output_logits": True}
    expected = None
    for count, proposer in ((1, draft), (2, target), (3, draft)):
        threads(count)
        if expected is None or backend == "reference":
            expected = sm.generate(target, prompts, **options)
        result = sm.generate(target, prompts, draft=proposer, **options)
        for row in range(len(prompts)):
            assert_bitwise_equal(result.logits[row], expected.logits[row], f"{count} threads, row {row}")
            assert torch.equal(result.sequences[row], expected.sequences[row])


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 1, "d_model": 8},
        {"d_conv": 2},
        {"d_conv": 7, "d_state": 1},
        {"d_state": 16, "d_model": 40, "dt_rank": 1},
        {"vocab_size": 1001},
        {"conv_bias": False},
        {"tie_embeddings": True},
    ],
    ids=str,
)
def test_shapes(plain, sizes):
    target = random_model(tiny_config(**{"tie_embeddings": False, **sizes}), seed=3)
    draft = random_model(tiny_config(vocab_size=target.vocab_size, n_layer=1), seed=4)
    prompts = [[5], [1, 2, 3, 4, 5, 6], [7] * 66]
    check(target, draft, prompts, plain, lookahead=3)
    texts = [plain(target, p, TOKENS)[0] for p in prompts]
    check(target, scripted(texts, agree_at_rate(0.7), target.vocab_size), prompts, plain, lookahead=3)


def test_embedded_pair(plain):
    target, draft = sm.load_model("builtin:target"), sm.load_model("builtin:draft")
    texts = ["The morning was fine, and Elizabeth", "It", "He said that he would come to London in the evening. " * 2]
    prompts = [target.tokenizer.encode(text).ids for text in texts]
    for lookahead in (1, 4, 8):
        stats = check(target, draft, prompts, plain, lookahead, tokens=40).stats
        assert stats.acceptance_rate > 0.3, "the embedded draft is made for this target"


def test_longest_lookahead(pair, plain, prompt):
    models = pair()
    check(models.target, models.drafts["equal"], [prompt(5), prompt(1)], plain, lookahead=15, tokens=40)


@pytest.mark.parametrize("lookahead", [1, 4, 7])
@pytest.mark.parametrize("tokens", [1, 8, 17])
def test_an_equal_draft_is_accepted_in_full(pair, prompt, lookahead, tokens):
    models = pair()
    for length in (1, 2, 30):
        stats = sm.generate(
            models.target, [prompt(length)], draft=models.target, lookahead=lookahead, max_new_tokens=tokens,
            stop_token_ids=(),
        ).stats  # fmt: skip
        assert stats.accepted == stats.tested == stats.drafted
        assert stats.rounds == math.ceil(tokens / (lookahead + 1))


@pytest.mark.parametrize("dtype", [torch.float32, "q4_0"], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [1, 2, 13, 66])
def test_against_a_forward_pass_over_the_whole_text(pair, prompt, dtype, backend, length):
    """Nothing of the ops or the loop is in the oracle: float64, from scratch for every token."""
    models = pair(dtype, backend)
    expected = oracle.greedy(models.target, prompt(length), TOKENS)
    result = sm.generate(
        models.target, [prompt(length)], draft=models.drafts["near"], lookahead=3, max_new_tokens=TOKENS,
        stop_token_ids=(), output_logits=True,
    )  # fmt: skip
    assert result.sequences[0].tolist() == expected
    exact = oracle.full_forward(models.target, expected[:-1])[length - 1 :]
    torch.testing.assert_close(result.logits[0].double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_of_equal_logits_the_lowest_id_wins():
    table = torch.full((7, 7), 1 / 7)
    table[0] = torch.tensor([0, 0, 0.1, 0.3, 0.3, 0.3, 0])
    target = TableModel(table)
    draft = ScriptedDraft([[0, 4, 4, 4, 4]], 7, lambda row, position: True)  # tied for first, but not the lowest
    assert sm.generate(target, [[0]], max_new_tokens=4).sequences[0].tolist() == [0, 3, 0, 3, 0]
    result = sm.generate(target, [[0]], draft=draft, max_new_tokens=4)
    assert result.sequences[0].tolist() == [0, 3, 0, 3, 0] and result.stats.accepted == 0


def test_the_given_prompt_is_not_changed(pair, prompt):
    ids = torch.tensor([prompt(6), prompt(6, seed=1)])
    before = ids.clone()
    from_tensor = sm.generate(pair().target, ids, max_new_tokens=5)
    from_lists = sm.generate(pair().target, before.tolist(), max_new_tokens=5)
    assert torch.equal(ids, before)
    for a, b in zip(from_tensor.sequences, from_lists.sequences, strict=True):
        assert a.dtype == torch.int64 and torch.equal(a, b)
