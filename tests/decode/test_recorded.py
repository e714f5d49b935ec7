"""Rounds that are recorded: what they work on may move, and what could not be run again is refused."""

import gc
import weakref

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.decode.drafts import ModelDrafter, Proposal, as_draft
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


@pytest.mark.parametrize("sampling", [sm.SamplingParams(), sm.SamplingParams(temperature=1.0, seed=3)])
def test_what_a_draft_proposes_is_only_read(sampling: sm.SamplingParams) -> None:
    """Catches: a later proposal was written over the first one, which the draft may keep and may have expanded."""

    class Table:
        vocab_size = 61

        def __init__(self) -> None:
            self.tokens = [torch.full((2, LOOKAHEAD), token) for token in range(self.vocab_size)]
            self.probs = torch.full((self.vocab_size,), 1 / self.vocab_size)

        def begin(self, prompts: object, lookahead: int, sampler: object) -> None: ...

        def propose(self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int) -> tuple:
            probs = self.probs.expand(2, lookahead, -1)
            return self.tokens[rows[0][-1]][:, :lookahead], None if sampling.greedy else probs

    target, table, prompts = hybrid(0), Table(), [[1, 2, 3], [4]]
    drafted = sm.generate(target, prompts, draft=table, lookahead=LOOKAHEAD, max_new_tokens=20, sampling=sampling)
    assert all((tokens == at).all() for at, tokens in enumerate(table.tokens))
    assert (table.probs == table.probs[0]).all()
    if sampling.greedy:
        plain = sm.generate(target, prompts, max_new_tokens=20)
        assert all(map(torch.equal, drafted.sequences, plain.sequences))


def test_a_draft_may_give_one_proposal_again_with_other_tokens() -> None:
    """Catches: rounds went on with the tokens that it held when they were recorded."""
    target = hybrid(0)
    text = sm.generate(target, [[1, 2, 3]], max_new_tokens=30).sequences[0]

    class Oracle(sm.Draft):
        vocab_size = target.vocab_size

        def allocate(self, batch: int, lookahead: int, sampler: object, *, captured: bool) -> "Oracle":
            self.proposal = None
            return self

        def prefill(self, row: int, text: list[int], state: object = None) -> None: ...

        def propose(self, state: object, lookahead: int) -> Proposal:
            at = int(state.positions[0])
            tokens = text[None, at : at + lookahead]
            self.proposal = self.proposal or Proposal(tokens)
            self.proposal.tokens = tokens
            return self.proposal

    stats = sm.generate(target, [[1, 2, 3]], draft=Oracle(), lookahead=LOOKAHEAD, max_new_tokens=30).stats
    assert stats.accepted == stats.tested > 15


class Kept:
    """Calls of one executor; each text is compared with that of a call that has nothing from before."""

    def __init__(self, runs: list[Recording], **options: int) -> None:
        self.executor, self._runs = sm.EagerExecutor(**options), runs

    def records(self, target: sm.MambaLM, prompts: list, **options: object) -> bool:
        """Whether the first round of a call had parts to record."""
        self._runs.clear()
        options = {"lookahead": LOOKAHEAD, "max_new_tokens": 20, "stop_token_ids": ()} | options
        result = sm.generate(target, prompts, executor=self.executor, **options)
        ran, parts = len(self._runs), 1 + (options.get("draft") is not None)
        fresh = sm.generate(target, prompts, **options)
        assert all(map(torch.equal, result.sequences, fresh.sequences))
        assert ran in (parts * result.stats.rounds, parts * (result.stats.rounds - 1))
        return ran != parts * result.stats.rounds


def test_an_executor_keeps_its_rounds(runs: list[Recording]) -> None:
    """Texts, lengths and the values of parameters are data."""
    target, draft, kept = hybrid(0), hybrid(1), Kept(runs)
    warm, cold = sm.SamplingParams(temperature=1.0, seed=3), sm.SamplingParams(temperature=0.3, top_k=5, seed=4)
    assert kept.records(target, [[1, 2, 3]], draft=draft, sampling=warm)
    assert not kept.records(target, [[5] * 30], draft=draft, sampling=cold, max_new_tokens=25)
    assert not kept.records(target, [[1]], draft=draft, sampling=warm)
    assert kept.records(target, [[1]], draft=draft)  # greedy
    assert not kept.records(target, [[4, 5]], draft=draft)
    assert kept.records(target, [[1], [2]], draft=draft)
    assert kept.records(target, [[1]], draft=draft, sampling=warm)  # two kinds were kept, and came later
    kept.executor.clear()
    assert kept.records(target, [[1]], draft=draft, sampling=warm)


def test_a_kept_round_is_of_the_model_as_it_is(runs: list[Recording]) -> None:
    target, kept = hybrid(0), Kept(runs)
    assert kept.records(target, [[1, 2, 3]])
    target.embedding = target.embedding.flip(0).contiguous()
    assert kept.records(target, [[1, 2, 3]])
    target.forbid([int(sm.generate(target, [[1, 2, 3]], max_new_tokens=1).sequences[0][-1])])
    assert kept.records(target, [[1, 2, 3]])
    assert not kept.records(target, [[1, 2, 3]])
    assert kept.records(hybrid(2), [[1, 2, 3]])


def test_a_kept_round_knows_nothing_of_python(runs: list[Recording]) -> None:
    """Catches: a call without a logits_processor, or with another draft, found the round of one that had it."""
    target, kept = hybrid(0), Kept(runs)

    def forbid(row: int, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([33, 53]), -torch.inf)

    assert kept.records(target, [[1, 2, 3]])
    plain = sm.generate(target, [[1, 2, 3]], executor=kept.executor, max_new_tokens=20).sequences[0]
    options = {"executor": kept.executor, "max_new_tokens": 20, "logits_processor": forbid}
    assert not {33, 53} & set(sm.generate(target, [[1, 2, 3]], **options).sequences[0].tolist())
    again = sm.generate(target, [[1, 2, 3]], executor=kept.executor, max_new_tokens=20).sequences[0]
    assert torch.equal(plain, again) and {33, 53} & set(plain.tolist())


def test_a_kept_round_after_a_call_that_broke_off(runs: list[Recording]) -> None:
    target, draft, kept = hybrid(0), hybrid(1), Kept(runs)

    def stop(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.generate(
            target, [[1, 2, 3]], draft=draft, lookahead=LOOKAHEAD, max_new_tokens=20, stop_token_ids=(),
            executor=kept.executor, on_token=stop,
        )  # fmt: skip
    assert kept.records(target, [[3, 2]], draft=draft)


def test_what_is_kept_is_freed_with_its_executor(runs: list[Recording]) -> None:
    target, kept = hybrid(0), Kept(runs, max_recorded=1)
    held = weakref.ref(target)
    assert kept.records(target, [[1, 2, 3]])
    del target
    gc.collect()
    assert held() is not None
    kept.executor.clear()
    gc.collect()
    assert held() is None
    with pytest.raises(ValueError, match=r"^max_recorded must be a whole number of at least 0, got -1$"):
        sm.EagerExecutor(max_recorded=-1)


def test_a_call_that_breaks_off_leaves_no_round() -> None:
    """Nobody knows what its caches hold. Catches: a round kept before the call came to its end."""
    model, executor = random_model(tiny_architecture("mamba1"), backend="cpu"), sm.EagerExecutor()
    options = {"max_new_tokens": 4, "executor": executor, "stop_token_ids": ()}

    def broken(committed: object) -> None:
        raise KeyError

    sm.generate(model, [[1, 2]], **options)
    assert executor._recorded
    with pytest.raises(KeyError):
        sm.generate(model, [[1, 2]], on_commit=broken, **options)
    assert not executor._recorded
    with torch.inference_mode():
        sm.generate(model, [[1, 2]], **options)
    assert not executor._recorded
