"""The comparison with other engines, on a tiny shape: who is timed, who is not and why, and what a row holds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import speculative_mamba as sm
from benchmarks import peers
from benchmarks.peer_files import write_checkpoint
from speculative_mamba.testing.models import random_model

KEYS = {
    "op", "case", "backend", "shape", "dtype", "batch", "tokens", "median_s", "tokens_per_s", "steps", "gb_per_s",
    "share_of_bandwidth", "logit_error", "baseline", "ratio",
}  # fmt: skip
OPS = {"step", "verify", "prefill", "decode"}
MODULES = {"llama.cpp": "llama_cpp", "transformers": "transformers"}
Run = Callable[..., list[dict]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(*dtypes, without=()): the rows of a short run; peers named in ``without`` look as if not installed."""

    def run(*dtypes: str, without: tuple[str, ...] = ()) -> list[dict]:
        for name in without:
            monkeypatch.setitem(sys.modules, MODULES[name], None)
        settings = "--models tiny --tokens 6 --prefill 9 --rounds 1 --repeats 1 --json"
        peers.main([*settings.split(), str(tmp_path / "rows.json"), "--dtypes", *dtypes])
        return json.loads((tmp_path / "rows.json").read_text())

    return run


def engines(rows: list[dict]) -> set[str]:
    return {row["case"].split()[1] for row in rows}


def check(rows: list[dict], peer: str, dtype: str) -> None:
    """Every call of both engines is there; ours names the peer as the baseline, and is faster by ``ratio``."""
    assert engines(rows) == {"ours", peer}
    for row in rows:
        assert row.keys() - {"acceptance", "tokens_per_round"} == KEYS
        assert row["median_s"] > 0 and row["shape"] == "128x6"
    theirs = {row["op"]: row["median_s"] for row in rows if row["dtype"] == dtype and row["baseline"] is None}
    assert theirs.keys() == OPS
    ours = [row for row in rows if row["baseline"] == f"{peer} {dtype}"]
    assert {row["op"] for row in ours} == OPS and len(ours) == len(OPS) + 1, "plain decoding and with a draft"
    for row in ours:
        assert row["ratio"] == pytest.approx(theirs[row["op"]] / row["median_s"])


def test_transformers_agrees_and_is_timed(run: Run, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    rows = run("float32", without=("llama.cpp",))
    check(rows, "transformers", "float32")
    assert max(row["logit_error"] for row in rows) < 1e-5
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "skipped" in line]) == 1
    assert any(line.startswith("llama.cpp skipped: ") and "llama_cpp" in line for line in lines)


@pytest.mark.parametrize(("dtype", "theirs"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_llama_cpp_agrees_and_is_timed(run: Run, dtype: str, theirs: str) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    rows = run(dtype, without=("transformers",))
    check(rows, "llama.cpp", theirs)
    assert max(row["logit_error"] for row in rows) < {"float32": 1e-5, "bfloat16": 0.02}[dtype]


def test_llama_cpp_with_eight_bits_stays_near(run: Run) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    rows = [row for row in run("q8_0", without=("transformers",)) if row["dtype"] == "q8_0"]
    assert {row["op"] for row in rows} == OPS
    assert max(row["logit_error"] for row in rows) < 0.05


def test_without_peers_ours_is_timed_alone(run: Run, capsys: pytest.CaptureFixture) -> None:
    rows = run("bfloat16", without=("llama.cpp", "transformers"))
    assert engines(rows) == {"ours"}
    assert {row["baseline"] for row in rows} == {None, "plain decoding"}
    assert capsys.readouterr().out.count(" skipped: ") == 2


def test_a_peer_that_disagrees_is_not_timed(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("transformers")
    feed = peers.Transformers.feed
    monkeypatch.setattr(peers.Transformers, "feed", lambda self, tokens: 1.01 * feed(self, tokens))
    rows = run("bfloat16", without=("llama.cpp",))
    assert engines(rows) == {"ours"}
    lines = capsys.readouterr().out.splitlines()
    refused = [line for line in lines if "not timed" in line]
    assert len(refused) == 1 and refused[0].startswith("tiny transformers float32 not timed: relative error")


def test_the_checkpoint_holds_the_model(tmp_path: Path) -> None:
    model = random_model(peers.TINY, dtype=torch.bfloat16)
    write_checkpoint(model, tmp_path / "checkpoint")
    loaded = sm.load_model(tmp_path / "checkpoint")
    assert loaded.config == model.config
    assert torch.equal(loaded.embedding, model.embedding) and torch.equal(loaded.norm_weight, model.norm_weight)
    for mine, theirs in zip(loaded.blocks, model.blocks, strict=True):
        assert torch.equal(mine.norm_weight, theirs.norm_weight)
        torch.testing.assert_close(mine.mixers[0].A, theirs.mixers[0].A)
        for name in ("in_proj", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "D", "out_proj"):
            assert torch.equal(getattr(mine.mixers[0], name), getattr(theirs.mixers[0], name)), name
