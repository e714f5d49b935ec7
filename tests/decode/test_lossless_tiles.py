"""Greedy decoding where linear layers multiply by tiles (AMX, or its emulation): tokens and logits with a draft are
those without, bit for bit, however a prompt is cut."""

from collections.abc import Callable, Iterator

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.models import language_model
from speculative_mamba.ops.backend import extension
from speculative_mamba.testing.models import random_model, tiny_config
from speculative_mamba.testing.scripted import ScriptedDraft, agree_at_rate
from speculative_mamba.testing.tolerance import assert_bitwise_equal

MODULE = extension()[0]
TILED = [isa for isa in (*MODULE.available_isas(), *MODULE.emulated_isas()) if isa.startswith("amx")] if MODULE else []
pytestmark = pytest.mark.skipif(not TILED, reason="tiles are emulated by AVX2")
TOKENS = 10


@pytest.fixture
def model() -> Iterator[sm.MambaLM]:
    before = MODULE.isa()
    MODULE.select_isa(TILED[0])
    yield random_model(tiny_config(d_model=528, n_layer=1, d_state=16), dtype=torch.bfloat16, backend="cpu")
    MODULE.select_isa(before)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lookahead", [1, 4, 8])
def test_a_draft_changes_no_bit(
    rows: int, lookahead: int, model: sm.MambaLM, plain: Callable, prompt: Callable
) -> None:
    """Batch times window: rows of x in one group of tiles, and in two."""
    prompts = [prompt(length) for length in (9, 2, 290)[:rows]]
    texts = [plain(model, each, TOKENS) for each in prompts]
    draft = ScriptedDraft([text for text, _ in texts], model.vocab_size, agree_at_rate(0.6, 1))
    result = sm.generate(
        model, prompts, draft=draft, lookahead=lookahead, max_new_tokens=TOKENS, stop_token_ids=(), output_logits=True
    )
    for row, (text, logits) in enumerate(texts):
        assert result.sequences[row].tolist() == text
        assert_bitwise_equal(result.logits[row], logits, f"logits of row {row}")


def test_a_prompt_may_be_cut_anywhere(model: sm.MambaLM, prompt: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of x one by one, few and many: weights as they lie, and packed."""
    results = []
    for chunk in (1, 7, 33, language_model.PREFILL_CHUNK_OF_TILES):
        monkeypatch.setattr(language_model, "PREFILL_CHUNK_OF_TILES", chunk)
        results.append(sm.generate(model, [prompt(300)], max_new_tokens=2, stop_token_ids=(), output_logits=True))
    for result in results[1:]:
        assert_bitwise_equal(result.logits[0], results[0].logits[0])
