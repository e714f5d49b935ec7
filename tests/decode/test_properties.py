"""Any model, batch, draft, lookahead, sampling, budget and stop: what comes out is plain decoding of each row alone."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import speculative_mamba as sm
from speculative_mamba.decode import NgramDrafter
from speculative_mamba.models.config import mamba1_config
from speculative_mamba.ops import causal_conv1d_verify, selective_scan_verify
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import random_model
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal

LONGEST = 10
VOCABULARY = 61


def examples(count):
    """The same examples in every run, and no files."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@pytest.fixture
def with_threads(threads):
    """with_threads(n, function): the function's result with n threads."""

    def call(count, function):
        threads(count)
        return function()

    return call


tokens = st.integers(0, VOCABULARY - 1)
batches = st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=4)
agreement = st.lists(st.booleans(), min_size=1, max_size=7)
sampling = st.one_of(
    st.just(sm.SamplingParams()),
    st.builds(sm.SamplingParams, repetition_penalty=st.floats(0.5, 2)),
    st.builds(
        sm.SamplingParams,
        temperature=st.floats(0.01, 3),
        top_k=st.sampled_from([0, 0, 2, 7, VOCABULARY, 100]),
        top_p=st.one_of(st.just(1.0), st.floats(0.05, 1)),
        min_p=st.one_of(st.just(0.0), st.floats(0, 0.5)),
        repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
        seed=st.integers(0, 2**63 - 1),
    ),
)


def make_draft(kind, models, texts, agreement):
    """A scripted one is right where the pattern says so."""
    if kind == "scripted":
        return ScriptedDraft(texts, VOCABULARY, lambda row, at: agreement[(row + at) % len(agreement)])
    return NgramDrafter(VOCABULARY, shortest=1) if kind == "ngram" else models.drafts.get(kind)


@examples(150)
@given(
    prompts=batches,
    sampling=sampling,
    kind=st.sampled_from(["scripted", "scripted", "near", "random", "equal", "ngram"]),
    agreement=agreement,
    lookahead=st.integers(1, 15),
    budget=st.integers(0, LONGEST),
    stops=st.sets(tokens, max_size=8),
    threads=st.integers(1, 2),
)
def test_any_run_is_plain_decoding_cut_at_its_stop(
    pair, with_threads, prompts, sampling, kind, agreement, lookahead, budget, stops, threads
):
    """A row of a batch draws by its own number; alone, it is given that number's noise by a seed per row."""
    models = pair()
    seeds = [(sampling.seed + row) % 2**63 for row in range(len(prompts))]
    alone = [
        sm.generate(
            models.target, [prompt], max_new_tokens=LONGEST, stop_token_ids=(), output_logits=True,
            sampling=dataclasses.replace(sampling, seed=[seed]),
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]  # fmt: skip
    texts = [result.sequences[0].tolist() for result in alone]
    draft = make_draft(kind, models, texts, agreement)
    result = with_threads(
        threads,
        lambda: sm.generate(
            models.target, prompts, draft=draft, lookahead=lookahead, max_new_tokens=budget,
            stop_token_ids=tuple(stops), output_logits=True, acceptance="coupled",
            sampling=dataclasses.replace(sampling, seed=seeds),
        ),
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        new = texts[row][len(prompt) : len(prompt) + budget]
        end = next((at + 1 for at, token in enumerate(new) if token in stops), len(new))
        assert result.sequences[row].tolist() == texts[row][: len(prompt) + end]
        assert_bitwise_equal(result.logits[row], alone[row].logits[0][:end])
        assert result.finish_reasons[row] == ("eos" if new[:end] and new[end - 1] in stops else "length")
    assert result.stats.tokens == sum(map(len, result.sequences)) - sum(map(len, prompts))


@examples(100)
@given(
    prompts=batches,
    sampling=sampling,
    agreement=agreement,
    calls=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.one_of(st.integers(1, 9), st.just("auto")),
            st.sampled_from(["scripted", "near", "random", "equal", "ngram", "none"]),
        ),
        min_size=1,
        max_size=4,
    ),
    said=st.lists(tokens, max_size=3),
)
def test_any_chain_of_calls_is_one_call(pair, assert_states_fit, prompts, sampling, agreement, calls, said):
    """Of random budgets, lookaheads and drafts; then the user says something, which equals a fresh call on it all."""
    models = pair()
    options = {"sampling": sampling, "acceptance": "coupled", "stop_token_ids": (), "output_logits": True}
    whole = sm.generate(models.target, prompts, max_new_tokens=sum(budget for budget, _, _ in calls), **options)
    texts = [sequence.tolist() for sequence in whole.sequences]
    cache, current, logits = sm.GenerationCache(), prompts, []
    for budget, lookahead, kind in calls:
        draft = make_draft(kind, models, texts, agreement)
        result = sm.generate(
            models.target, current, draft=draft, lookahead=lookahead, max_new_tokens=budget, cache=cache, **options
        )
        logits.append(result.logits)
        current = cache.sequences
        assert current == [sequence.tolist() for sequence in result.sequences]
        assert_states_fit(cache, complete=False)
    assert current == texts
    for row, parts in enumerate(zip(*logits, strict=True)):
        assert_bitwise_equal(torch.cat(parts), whole.logits[row], f"logits of row {row}")
    current = [text + said for text in texts]
    result = sm.generate(models.target, current, draft=models.drafts["near"], max_new_tokens=3, cache=cache, **options)
    fresh = sm.generate(models.target, current, max_new_tokens=3, **options)
    assert cache.sequences == [sequence.tolist() for sequence in fresh.sequences]
    assert_states_fit(cache)


LARGEST = {"d_model": 40, "n_layer": 3, "vocab_size": 90, "d_inner": 70, "dt_rank": 6, "d_state": 18, "d_conv": 8}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
largest = functools.cache(lambda dtype: random_model(mamba1_config(**LARGEST, tie_embeddings=False), dtype=dtype))


def cut_out(config, dtype, seed):
    """A model of any shape, quickly: its weights are pieces of a larger model's, from places that the seed chooses."""

    def cut(weight, *sizes):
        moved = weight.roll([seed % size for size in weight.shape], list(range(weight.ndim)))
        return moved[tuple(map(slice, sizes))].contiguous()

    whole, c, of_block = largest(dtype), config, config.blocks[0]
    d, D, N, R = c.d_model, of_block.d_inner, of_block.d_state, of_block.dt_rank
    blocks = []
    for block in whole.blocks[: len(c.blocks)]:
        m = block.mixers[0]
        mixer = dataclasses.replace(
            m, in_proj=cut(m.in_proj, 2 * D, d), conv_weight=cut(m.conv_weight, D, of_block.d_conv),
            conv_bias=cut(m.conv_bias, D) if of_block.conv_bias else None, x_proj=cut(m.x_proj, R + 2 * N, D),
            dt_proj=cut(m.dt_proj, D, R), dt_bias=cut(m.dt_bias, D), A=cut(m.A, D, N), D=cut(m.D, D),
            out_proj=cut(m.out_proj, d, D),
        )  # fmt: skip
        blocks.append(dataclasses.replace(block, norm_weight=cut(block.norm_weight, d), mixers=(mixer,)))
    embedding = cut(whole.embedding, c.vocab_size, d)
    return dataclasses.replace(
        whole, config=c, embedding=embedding, blocks=blocks, norm_weight=cut(whole.norm_weight, d),
        head=embedding if c.tie_embeddings else cut(whole.head, c.vocab_size, d),
    )  # fmt: skip


shapes = st.fixed_dictionaries(
    {
        "d_model": st.integers(2, 40),
        "n_layer": st.integers(1, 3),
        "vocab_size": st.integers(2, 90),
        "d_inner": st.integers(1, 70),
        "dt_rank": st.integers(1, 6),
        "d_state": st.integers(1, 18),
        "d_conv": st.integers(2, 8),
        "tie_embeddings": st.booleans(),
        "conv_bias": st.booleans(),
    }
)


@examples(130)
@given(
    shape=shapes,
    weights=st.sampled_from(list(WEIGHTS)),
    seed=st.integers(0, 10**6),
    length=st.integers(1, 20),
    lookahead=st.integers(1, 8),
    layers_of_draft=st.integers(1, 2),
)
def test_any_shape_against_float64(shape, weights, seed, length, lookahead, layers_of_draft):
    """The oracle computes with the same weights in float64, from scratch over the whole text.

    Logits agree to 10⁻⁵ of the row's largest. A token may differ from the oracle's choice only where two logits are
    closer than that.
    """
    target = cut_out(mamba1_config(**shape), WEIGHTS[weights], seed)
    draft = cut_out(mamba1_config(**{**shape, "n_layer": layers_of_draft, "d_state": 3}), torch.float32, seed + 1)
    vocabulary = shape["vocab_size"]
    prompt = [(seed * 7 + at * at * 31) % vocabulary for at in range(length)]
    result = sm.generate(
        target, [prompt], draft=draft, lookahead=lookahead, max_new_tokens=8, stop_token_ids=(), output_logits=True
    )
    text = result.sequences[0].tolist()
    exact = oracle.full_forward(target, text[:-1])[length - 1 :]
    bound = 1e-5 * exact.abs().amax(-1, keepdim=True)
    assert ((result.logits[0].double() - exact).abs() <= bound).all()
    for logits, limit, token in zip(exact, bound, text[length:], strict=True):
        assert logits.max() - logits[token] <= 2 * limit


@functools.cache
def noise(seed):
    return torch.randn(6000, generator=torch.Generator().manual_seed(seed))


def strided(seed, shape, padding, batch_step):
    """Random values of a shape within NaN: rows ``padding`` wider, and every ``batch_step``-th of a larger batch."""
    wide = torch.full((shape[0] * batch_step, *shape[1:-1], shape[-1] + padding), torch.nan)
    inner = wide[::batch_step, ..., : shape[-1]]
    count = inner.numel()
    inner.copy_(noise(seed % 50).repeat(-(-count // 6000))[:count].view(inner.shape).roll(seed, -1))
    return inner


ops = {
    "batch": st.integers(1, 4),
    "count": st.integers(1, 8),
    "channels": st.integers(1, 70),
    "spare": st.integers(0, 4),
    "write": st.integers(0, 4),
    "starts": st.lists(st.integers(0, 30), min_size=4, max_size=4),
    "left": st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
    "padding": st.integers(0, 5),
    "batch_step": st.integers(1, 3),
    "threads": st.integers(1, 2),
    "seed": st.integers(0, 10**6),
}


def slots_and_paddings(batch, count, spare, write, starts, left):
    """Rows with left padding begin with them, so they start from slot 0, which the caller makes zero."""
    write = min(write, spare)
    slots = count + spare
    left = None if left is None else torch.tensor([min(n, count) for n in left[:batch]], dtype=torch.int32)
    start = torch.tensor([s % slots for s in starts[:batch]], dtype=torch.int32)
    return slots, write, start, left


def step_by_step(call, batch, count, write, start, left):
    """One call per token: token t reads the slot of token t-1 and writes the next."""
    outputs = []
    for t in range(count):
        first = start if t == 0 else torch.full((batch,), write + t - 1, dtype=torch.int32)
        of_token = None if left is None else (left > t).int()
        outputs.append(call(slice(t, t + 1), first, write + t, of_token))
    return torch.cat(outputs, 1)


@examples(100)
@given(state_size=st.integers(1, 20), gate=st.booleans(), **ops)
def test_any_scan_is_its_single_steps(
    with_threads, state_size, gate, batch, count, channels, spare, write, starts, left, padding, batch_step, threads,
    seed,
):  # fmt: skip
    slots, write, start, left = slots_and_paddings(batch, count, spare, write, starts, left)
    x, dt, z = (strided(seed + i, (batch, count, channels), padding, batch_step) for i in range(3))
    B, C = (strided(seed + i, (batch, count, state_size), padding, batch_step) for i in (3, 4))
    A = -strided(seed + 5, (channels, state_size), 0, 1).abs()
    D, bias = (strided(seed + i, (1, channels), 0, 1)[0] for i in (6, 7))
    # (D, N) stays contiguous; rows and slots lie apart.
    held = strided(seed + 8, (batch, slots, 1 + padding, channels, state_size), 0, batch_step)[:, :, 0]
    stepped = held.clone() if padding % 2 else held.clone().transpose(0, 1).contiguous().transpose(0, 1)

    def call(states, at, first, write, of_token):
        return selective_scan_verify(
            x[:, at], dt[:, at], A, B[:, at], C[:, at], D, z[:, at] if gate else None, bias, states, first, write,
            left_padding=of_token, backend="cpu",
        )  # fmt: skip

    together = with_threads(threads, lambda: call(held, slice(None), start, write, left))
    single = step_by_step(functools.partial(call, stepped), batch, count, write, start, left)
    assert_bitwise_equal(together, single, "y")
    assert_bitwise_equal(held, stepped, "snapshots")
    assert not together.isnan().any()


@examples(100)
@given(width=st.integers(2, 8), dtype=st.sampled_from(list(WEIGHTS)), with_bias=st.booleans(), **ops)
def test_any_convolution_is_its_single_steps(
    with_threads, width, dtype, with_bias, batch, count, channels, spare, write, starts, left, padding, batch_step,
    threads, seed,
):  # fmt: skip
    slots, write, start, left = slots_and_paddings(batch, count, spare, write, starts, left)
    x = strided(seed, (batch, count, channels), padding, batch_step)
    weight = strided(seed + 1, (channels, width), padding, 1).to(WEIGHTS[dtype])
    bias = strided(seed + 2, (1, channels), 0, 1)[0] if with_bias else None
    held = strided(seed + 3, (batch, width - 1 + slots, channels), padding, batch_step)
    # Step by step, each row from a window that has its history as slot 0's.
    history = [held[row, slot + 1 : slot + width].clone() for row, slot in enumerate(start.tolist())]
    stepped = torch.full((batch, width - 1 + count + 1, channels), torch.nan)
    stepped[:, 1:width] = torch.stack(history)

    def call(window, at, first, write, of_token):
        return causal_conv1d_verify(x[:, at], weight, bias, window, first, write, left_padding=of_token, backend="cpu")

    together = with_threads(threads, lambda: call(held, slice(None), start, write, left))
    first = torch.zeros(batch, dtype=torch.int32)
    single = step_by_step(functools.partial(call, stepped), batch, count, 1, first, left)
    assert_bitwise_equal(together, single, "y")
    rows = slice(width - 1 + write, width - 1 + write + count)
    assert_bitwise_equal(held[:, rows].clone(), stepped[:, width : width + count].clone(), "the window's inputs")
    if write == 0:
        assert_bitwise_equal(held[:, : width - 1].clone(), torch.stack(history), "the history it moved")
