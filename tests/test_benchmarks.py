"""Benchmarks run, and say on stderr what they are doing, before each part that takes time."""

import sys

import pytest

from benchmarks import decode, drift, ngram, ops, report, rollback, sweep
from speculative_mamba.testing.models import tiny_config


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
    ops.bench_accept(None, vocabulary=50, lookahead=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "timing" in line]
    assert [line.split()[2].rstrip(",") for line in lines] == rows


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (decode, ("--models", "130m", "--draft", "130m", "--tokens", "4", "--repeats", "1")),
        (sweep, ("--tokens", "4", "--repeats", "1")),
        (rollback, ("--shapes", "130m", "--batches", "1")),
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
