"""Any batch, draft, lookahead, budget and stop: what comes out is plain decoding of each row alone, cut at its stop."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import speculative_mamba as sm
from speculative_mamba.testing.scripted import ScriptedDraft
from speculative_mamba.testing.tolerance import assert_bitwise_equal

LONGEST = 10

prompts = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=12), min_size=1, max_size=4)
agreement = st.lists(st.booleans(), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=prompts,
    agreement=agreement,
    lookahead=st.integers(1, 15),
    budget=st.integers(0, LONGEST),
    stops=st.sets(st.integers(0, 60), max_size=8),
    threads=st.integers(1, 2),
)
def test_any_run_is_plain_decoding_cut_at_its_stop(pair, plain, prompts, agreement, lookahead, budget, stops, threads):
    target = pair().target
    texts = [plain(target, prompt, LONGEST) for prompt in prompts]
    draft = ScriptedDraft(
        [tokens for tokens, _ in texts], target.vocab_size, lambda row, at: agreement[(row + at) % len(agreement)]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = sm.generate(
            target, prompts, draft=draft, lookahead=lookahead, max_new_tokens=budget, stop_token_ids=tuple(stops),
            output_logits=True,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for row, (prompt, (tokens, logits)) in enumerate(zip(prompts, texts, strict=True)):
        new = tokens[len(prompt) : len(prompt) + budget]
        end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))
        assert result.sequences[row].tolist() == tokens[: len(prompt) + end]
        assert_bitwise_equal(result.logits[row], logits[:end])
        assert result.finish_reasons[row] == ("eos" if new[:end] and new[end - 1] in stops else "length")
    assert result.stats.tokens == sum(map(len, result.sequences)) - sum(map(len, prompts))
