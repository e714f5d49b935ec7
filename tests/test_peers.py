"""The comparison with other engines, on a tiny shape: who is timed, who is not and why, and what a row holds."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import speculative_mamba as sm
from benchmarks import peers
from benchmarks.peer_engines import Ours
from benchmarks.peer_files import write_checkpoint, write_random_checkpoint
from speculative_mamba.testing.hybrids import HYBRIDS
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
    """run(*dtypes, without=(), kinds=None): the rows of a short run; peers named in ``without`` look as if not
    installed, ``kinds`` are there instead of all."""

    def run(*dtypes: str, without: tuple[str, ...] = (), kinds: tuple[type, ...] | None = None) -> list[dict]:
        for name in without:
            monkeypatch.setitem(sys.modules, MODULES[name], None)
        if kinds is not None:
            monkeypatch.setattr(peers, "PEERS", kinds)
            for kind in kinds:
                monkeypatch.setitem(peers.DTYPES["float32"][0], kind.name, "float32")
        settings = "--models tiny --tokens 6 --prefill 9 --rounds 1 --repeats 1 --json"
        peers.main([*settings.split(), str(tmp_path / "rows.json"), "--dtypes", *dtypes])
        return json.loads((tmp_path / "rows.json").read_text())

    return run


class Disagreeing(Ours):
    """A peer whose logits are a little off."""

    name = "disagreeing"

    def feed(self, tokens: list[int]) -> torch.Tensor:
        return 1.01 * super().feed(tokens)


class Crashing(Ours):
    """A peer that dies in a prefill of nine tokens, as llama.cpp does on some processors."""

    name = "crashing"

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        if len(tokens) == 9:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().prefill(tokens)


def engines(rows: list[dict]) -> set[str]:
    return {row["case"].split()[1] for row in rows}


def check(rows: list[dict], peer: str, dtype: str) -> None:
    """Every call of both engines is there; ours names the peer as the baseline, and is faster by ``ratio``."""
    assert engines(rows) == {"ours", peer}
    for row in rows:
        assert row.keys() - {"acceptance", "tokens_per_round"} == KEYS
        assert row["median_s"] > 0 and row["shape"] == "256x6"
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


@pytest.mark.parametrize(
    ("dtype", "theirs", "error"), [("float32", "f32", 1e-5), ("bfloat16", "bf16", 0.02), ("q8_0", "q8_0", 0.05)]
)
def test_llama_cpp_agrees_and_is_timed(run: Run, dtype: str, theirs: str, error: float) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    rows = run(dtype, without=("transformers",))
    check(rows, "llama.cpp", theirs)
    assert max(row["logit_error"] for row in rows) < error


def test_a_peer_that_disagrees_and_one_that_dies_are_rows_that_say_so(run: Run, capsys: pytest.CaptureFixture) -> None:
    rows = run("float32", "q4_0", kinds=(Disagreeing, Crashing))
    failed = {row["case"]: row["error"] for row in rows if row["op"] == "failed"}
    assert failed.keys() == {"tiny disagreeing", "tiny crashing"}
    assert failed["tiny disagreeing"].startswith("relative error of the logits")
    assert failed["tiny crashing"] == "prefill: its process was ended by SIGSEGV"
    rest = [row for row in rows if row["op"] != "failed"]
    assert {row["op"] for row in rest if "ours" in row["case"]} == OPS
    assert {row["op"] for row in rest if "crashing" in row["case"]} == {"step", "verify"}, "what came before stays"
    out = capsys.readouterr().out
    assert out.count("not timed") == 3 and "q4_0 not timed: its file is made by llama.cpp, which is missing" in out


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


def test_checkpoints_of_hybrids_are_the_same_model_in_both_formats(tmp_path: Path) -> None:
    gguf_files = pytest.importorskip("speculative_mamba.testing.gguf_files", reason="needs the gguf package")
    other = {
        "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 20, "intermediate_size": 13,
        "mamba_n_heads": 6, "mamba_d_head": 8, "num_local_experts": 5, "num_experts_per_tok": 2,
    }  # fmt: skip
    write_random_checkpoint(HYBRIDS["granite-4.0-h-tiny"] | other, tmp_path / "checkpoint")
    models = [tmp_path / "checkpoint", gguf_files.write_gguf(tmp_path / "checkpoint", tmp_path / "f32.gguf")]
    first, second = (sm.load_model(path, dtype="float32") for path in models)
    text, other = (sm.generate(model, [[1, 2, 3]], max_new_tokens=8, output_logits=True) for model in (first, second))
    assert torch.equal(text.logits[0], other.logits[0])
