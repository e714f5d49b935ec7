"""Benchmarks say on stderr what they are doing, before each part that takes time."""

import sys

import pytest

from benchmarks import ngram, ops, report
from speculative_mamba.testing.models import tiny_config


@pytest.fixture
def quick(monkeypatch):
    """quick(module, *arguments) runs a benchmark on tiny models and a machine that is known."""
    config = tiny_config(vocab_size=4000)
    monkeypatch.setattr(report, "read_bandwidth_gb_per_s", lambda: 10.0)

    def run(module, *arguments):
        monkeypatch.setattr(module, "published_config", lambda name: config)
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
