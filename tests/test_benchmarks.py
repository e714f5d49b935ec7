"""Benchmarks run, and say on stderr what they are doing, before each part that takes time."""

import math
import sys
from collections.abc import Sequence

import pytest
import torch

from benchmarks import decode, drift, ngram, ops, report, rollback, serve, serve_load, sweep
from speculative_mamba.models.builder import build
from speculative_mamba.models.config import AttentionConfig, ExpertsConfig
from speculative_mamba.models.formats import parse_config
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.testing.hybrids import HYBRIDS
from speculative_mamba.testing.models import ARCHITECTURES, random_model, tiny_architecture, tiny_config

# As published; of jamba-3b only 3.03 billion.
PARAMETERS = {
    "granite-4.0-h-350m": 340_332_224,
    "granite-4.0-h-micro": 3_191_396_096,
    "granite-4.0-h-tiny": 6_939_037_248,
    "lfm2-350m": 354_483_968,
    "lfm2-2.6b": 2_569_272_320,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "jamba-3b": 3_029_337_472,
    "falcon-h1-1.5b": 1_554_863_488,
}


@pytest.fixture
def quick(monkeypatch):
    """quick(module, *arguments) runs a benchmark on tiny models and a machine that is known."""
    config = tiny_config(vocab_size=4000)
    monkeypatch.setattr(report, "read_bandwidth_gb_per_s", lambda: 10.0)

    def run(module, *arguments):
        monkeypatch.setattr(module, "published_config", lambda name: config, raising=False)
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()

    return run


def test_ngram_says_what_it_does(quick, capsys):
    quick(ngram, "--tokens", "4", "--repeats", "2")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 + 3
    doing = err.splitlines()
    assert "bandwidth" in doing[0] and "weights" in doing[1]
    assert sum("pair of runs" in line for line in doing) == 3 * 2 and all(line.startswith("… ") for line in doing)


def test_ops_say_what_they_do_before_each_timing(monkeypatch, capsys):
    rows = []
    monkeypatch.setattr(ops, "interleaved_medians", lambda functions, rounds=0: dict.fromkeys(functions, 1e-3))
    monkeypatch.setattr(ops, "_add", lambda report, op, *_, **__: rows.append(op))
    config = tiny_config()
    for bench in (ops.bench_norm, ops.bench_conv, ops.bench_scan):
        bench(None, config)
    ops.bench_experts(None, ExpertsConfig(8, 3, 20), 24)
    ops.bench_expert_blocks(None, ExpertsConfig(8, 3, 20), 32)
    ops.bench_accept(None, vocabulary=50, lookahead=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "timing" in line]
    assert [line.split()[2].rstrip(",") for line in lines] == rows


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (decode, ("--models", "130m", "--draft", "130m", "--tokens", "4", "--repeats", "1")),
        (decode, ("--models", "lfm2-2.6b", "--rates", "0.7", "--tokens", "4", "--repeats", "1")),
        (sweep, ("--tokens", "4", "--repeats", "1")),
        (rollback, ("--shapes", "130m", "--batches", "1")),
        (serve, ("--models", "130m", "--widths", "2", "--tokens", "4", "--repeats", "1", "--chat", "40")),
        (serve_load, ("--requests", "9", "--clients", "3", "--width", "2")),
        (drift, ("--tokens", "8")),
        (drift, ("--tokens", "8", "--weights")),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else " ".join(value),
)
def test_a_benchmark_runs(quick, module, arguments, capsys):
    """Catches: a wrapper of ``Recording.run`` that lacks an option of it."""
    quick(module, *arguments)
    out, _ = capsys.readouterr()
    assert out.strip()


class CountedTensors:
    """Tensors of the right shapes without memory, and how many numbers they would hold."""

    device = torch.device("meta")

    def __init__(self) -> None:
        self.count = 0

    def has(self, name: str) -> bool:
        return False

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor:
        shape = shape if rows is None else (rows.stop - rows.start, *shape[1:])
        self.count += math.prod(shape)
        return torch.empty(shape, device=self.device)

    weight = float32 = matrix

    def experts(self, names: str | Sequence[str], *shape: int, rows: slice | None = None) -> ExpertWeight:
        outputs = shape[1] if rows is None else rows.stop - rows.start
        return ExpertWeight(tuple(self.matrix(str(names), outputs, shape[2]) for _ in range(shape[0])))


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_published_hybrid_has_as_many_parameters_as_its_model(name):
    """Catches: an attention layer too many, a gated norm that is missing."""
    source = CountedTensors()
    build(*parse_config(HYBRIDS[name]), source, "reference")
    assert source.count == PARAMETERS[name]


def test_the_draft_of_a_hybrid_attends():
    """Catches: blocks of several mixers that are not looked into."""
    config = decode.draft_config(random_model(tiny_architecture("parallel"), backend="reference"))
    assert any(isinstance(block, AttentionConfig) for block in config.blocks)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_ops_that_carry_state_are_timed(kind):
    """Catches: ``short_conv`` or ``mamba1_grouped`` left out of ``STATEFUL``."""
    model = random_model(tiny_architecture(kind), backend="reference")
    with decode.stateful_ops_timed(model) as spent:
        cache = model.new_cache(1, 1)
        model.verify(torch.zeros(1, 1, dtype=torch.long), cache, torch.zeros(1, dtype=torch.int32))
    assert len(spent) >= sum(mixer.stateful for mixer in model.mixers)
