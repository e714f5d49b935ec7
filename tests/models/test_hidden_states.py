"""Hidden states that verify leaves where it is told to: those that the head reads, whatever runs the step."""

import dataclasses

import pytest
import torch
from published import FORMATS

import speculative_mamba as sm
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import random_model, tiny_architecture
from speculative_mamba.testing.tolerance import assert_bitwise_equal

TOKENS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
START = torch.zeros(2, dtype=torch.int32)


def run(model, cache, tokens=TOKENS, write_slot=0):
    hidden = torch.full((*tokens.shape, model.config.d_model), torch.nan)
    return model.verify(tokens, cache, START + max(write_slot - 1, 0), write_slot, hidden_states=hidden), hidden


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["mamba1", "granite-hybrid", "parallel"])
def test_they_are_what_the_logits_are_made_from(kind, backend):
    """Also of a step that is run from a recording; logits keep their bits."""
    model = random_model(tiny_architecture(kind), backend=backend)
    plain = model.verify(TOKENS, model.new_cache(2, 4), START)
    cache = model.new_cache(2, 4)
    for _ in range(3):
        logits, hidden = run(model, cache)
        assert_bitwise_equal(logits, plain)
        made = hidden.double() @ oracle.dense(model.head, torch.float64).T / model.config.logits_scaling
        torch.testing.assert_close(logits.double(), made, rtol=0, atol=1e-5)
        for layer in cache:
            layer.reset()


def test_a_window_in_parts_gives_the_same_bits():
    model = random_model(tiny_architecture("granite-hybrid"))
    whole = run(model, model.new_cache(2, 4))[1]
    cache = model.new_cache(2, 4)
    parts = [run(model, cache, TOKENS[:, t : t + 1], t)[1] for t in range(4)]
    assert_bitwise_equal(torch.cat(parts, 1), whole)


def test_they_are_those_of_transformers(tmp_path):
    """``last_hidden_state``, which no multiplier of the logits has reached."""
    transformers = pytest.importorskip("transformers")
    FORMATS["granite-hybrid-hf"](tmp_path, 0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model = sm.load_model(tmp_path)
    with torch.no_grad():
        expected = theirs.model(TOKENS, use_cache=False).last_hidden_state
    torch.testing.assert_close(run(model, model.new_cache(2, 4))[1], expected, rtol=0, atol=1e-4)


def test_another_shape_is_refused():
    model = random_model(tiny_architecture("mamba1"))
    for shape in ((2, 4, 23), (4, 2, 24), (8, 24)):
        with pytest.raises(ValueError, match=r"hidden_states must have shape \(2, 4, 24\)"):
            model.verify(TOKENS, model.new_cache(2, 4), START, hidden_states=torch.zeros(shape))


def test_a_model_of_another_multiplier_is_another():
    """A recorded step is not run for a model that differs in a multiplier alone."""
    model = random_model(tiny_architecture("granite-hybrid"))
    cache = model.new_cache(2, 4)
    first = run(model, cache)[0]
    model.config = dataclasses.replace(model.config, logits_scaling=2 * model.config.logits_scaling)
    for layer in cache:
        layer.reset()
    torch.testing.assert_close(run(model, cache)[0], first / 2)
