"""Rounds that are recorded: what they work on may move, and what could not be run again is refused."""

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode.drafts import ModelDrafter, as_draft
from speculative_mamba.decode.lookahead import FixedLookahead
from speculative_mamba.ops.recording import Recording
from speculative_mamba.testing.models import random_model, tiny_architecture

LOOKAHEAD = 3


def hybrid(seed: int) -> sm.MambaLM:
    return random_model(tiny_architecture("mamba-in-llama"), seed=seed)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The recordings that are run again."""
    ran, run = [], Recording.run

    def noted(self: Recording, **options: bool) -> None:
        ran.append(self)
        run(self, **options)

    monkeypatch.setattr(Recording, "run", noted)
    return ran


def test_keys_that_move_between_rounds(runs: list[Recording]) -> None:
    """Catches: parts that work on the keys from before a prompt of another row made them grow."""
    target, draft = hybrid(0), hybrid(1)
    prompts = [[1, 2, 3], list(range(1, 30)) * 40]
    batch, executor = sm.Batch(2), sm.EagerExecutor()
    drafter = as_draft(draft, target, batch.texts, executor.captures)
    with executor, torch.no_grad():
        loop = sm.DecodeLoop(target, drafter, batch, executor, FixedLookahead(LOOKAHEAD))
        loop.admit(0, prompts[0], sm.SamplingParams(), 40)
        for _ in range(4):
            loop.step()
        capacity = batch.round.target.layers[1].capacity
        loop.admit(1, prompts[1], sm.SamplingParams(), 20)
        assert batch.round.target.layers[1].capacity > capacity
        while batch.generating():
            loop.step()
        texts = batch.texts()
        loop.close()
    assert runs
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == sm.generate(target, [prompt], max_new_tokens=len(text) - len(prompt)).sequences[0].tolist()


def test_rounds_are_recorded_once_for_each_lookahead(runs: list[Recording]) -> None:
    target, draft = hybrid(0), hybrid(1)
    stats = sm.generate(target, [[1, 2, 3]], draft=draft, lookahead=LOOKAHEAD, max_new_tokens=40).stats
    assert len(runs) == 2 * (stats.rounds - 1) and len(set(map(id, runs))) == 2


def test_a_draft_that_calls_pytorch_cannot_say_that_it_is_recordable() -> None:
    class Careless(ModelDrafter):
        def allocate(self, *sizes: object, captured: bool) -> ModelDrafter:
            allocated = super().allocate(*sizes, captured=captured)
            allocated.recordable = True
            return allocated

        def propose(self, state: object, lookahead: int) -> object:
            proposal = super().propose(state, lookahead)
            proposal.tokens = proposal.tokens + 0
            return proposal

    target = hybrid(0)
    drafter = Careless(hybrid(1))
    drafter.recordable = True
    with pytest.raises(ValueError, match=r"^aten\.add\.Tensor is PyTorch's and would not be run again"):
        sm.generate(target, [[1, 2]], draft=drafter, max_new_tokens=8)
