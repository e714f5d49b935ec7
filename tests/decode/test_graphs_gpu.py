"""CUDA graphs on a GPU: the text, logits and statistics of rounds that are run kernel by kernel; needs a GPU."""

import dataclasses

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import ARCHITECTURES, random_model, tiny_architecture
from speculative_mamba.testing.tolerance import assert_bitwise_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
FILTERED = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}
SAMPLING = {
    "greedy": {},
    "coupled": {"sampling": sm.SamplingParams(**FILTERED), "acceptance": "coupled"},
    "rejection": {"sampling": sm.SamplingParams(**FILTERED)},
}
PROMPTS = [[1, 2, 3, 4, 5], [6], list(range(40))]
COSTS = ("setup_s", "prefill_s", "decode_s", "draft_s", "verify_s", "peak_bytes")


def models(kind: str, backend: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[sm.MambaLM, sm.MambaLM]:
    return tuple(
        random_model(tiny_architecture(kind), dtype=dtype, seed=seed, backend=backend, device="cuda") for seed in (0, 1)
    )


def assert_same(result: sm.GenerationResult, expected: sm.GenerationResult) -> None:
    for mine, theirs in zip(result.sequences, expected.sequences, strict=True):
        assert mine.tolist() == theirs.tolist()
    mine, theirs = (
        {name: value for name, value in dataclasses.asdict(run.stats).items() if name not in COSTS}
        for run in (result, expected)
    )
    assert mine == theirs and result.finish_reasons == expected.finish_reasons
    for a, b in zip(result.logits or [], expected.logits or [], strict=True):
        assert_bitwise_equal(a.cpu(), b.cpu(), "logits")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_graph_gives_what_kernels_give_one_by_one(kind: str, sampling: str) -> None:
    target, draft = models(kind)
    graphs = sm.GraphExecutor()
    for chosen in (draft, target, "ngram", None):
        for budget, stops in ((1, ()), (17, ()), (17, (3, 9, 22, 37, 51))):
            options = {"draft": chosen, "lookahead": 3, "max_new_tokens": budget, "stop_token_ids": stops}
            options |= {"output_logits": True, **SAMPLING[sampling]}
            expected = sm.generate(target, PROMPTS, **options)
            assert_same(sm.generate(target, PROMPTS, executor=graphs, **options), expected)
    assert graphs.nbytes > 0


def test_triton_in_a_graph() -> None:
    target, draft = models("mamba1", "triton")
    options = {"draft": draft, "lookahead": 2, "max_new_tokens": 9, "stop_token_ids": ()}
    expected = sm.generate(target, PROMPTS, **options)
    assert_same(sm.generate(target, PROMPTS, executor="graph", **options), expected)


def test_speculation_in_graphs_is_plain_decoding() -> None:
    target, draft = models("mamba2attn")
    plain = sm.generate(target, PROMPTS, max_new_tokens=30, stop_token_ids=(), executor="graph")
    for lookahead in (1, 4, "auto"):
        result = sm.generate(
            target, PROMPTS, draft=draft, lookahead=lookahead, max_new_tokens=30, stop_token_ids=(), executor="graph"
        )
        for mine, theirs in zip(result.sequences, plain.sequences, strict=True):
            assert mine.tolist() == theirs.tolist()


def test_no_memory_for_a_graph_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    target, draft = models("mamba1")
    expected = sm.generate(target, PROMPTS, draft=draft, max_new_tokens=9, stop_token_ids=())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", full)
    result = sm.generate(target, PROMPTS, draft=draft, max_new_tokens=9, stop_token_ids=(), executor=sm.GraphExecutor())
    assert_same(result, expected)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no memory for a CUDA graph" in err


def test_the_host_waits_for_nothing_between_rounds() -> None:
    """The longer of two runs has not one synchronisation more."""
    target, draft = models("mamba1")
    graphs, counts = sm.GraphExecutor(), []
    for tokens in (20, 20, 60):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            sm.generate(target, [[1, 2, 3]], draft=draft, max_new_tokens=tokens, stop_token_ids=(), executor=graphs)
        waits = ("Synchronize", "cudaMemcpy")
        names = [event.name for event in trace.events() if event.name.startswith("cuda")]
        counts.append(sum("Synchronize" in name or name == waits[1] for name in names))
    assert counts[1] == counts[2]


def test_a_backend_that_reads_values_is_refused() -> None:
    target, _ = models("mamba1", "reference")
    with pytest.raises(ValueError, match="backend cuda or triton"):
        sm.generate(target, [[1, 2]], executor="graph")
