"""Weights in GGUF's blocks: against gguf's own dequantiser in float64, any draft, memory, dtypes."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import IDS, greedy, logits, write

import speculative_mamba as sm
from speculative_mamba.layers.experts import Experts
from speculative_mamba.ops.block_weight import BlockWeight
from speculative_mamba.testing.oracle import full_forward

gguf = pytest.importorskip("gguf")
gguf_files = pytest.importorskip("speculative_mamba.testing.gguf_files")

KINDS = ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q5_0"]
WIDE: dict[str, dict[str, Any]] = {  # rows of full blocks
    "mamba-hf": {"hidden_size": 256, "time_step_rank": 16, "num_hidden_layers": 2},
    "mamba2-hf": {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "num_hidden_layers": 2},
    "llama-hf": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "granite-hybrid-hf": {"hidden_size": 256, "shared_intermediate_size": 256, "mamba_n_heads": 8, "head_dim": 64},
    "granite-moe-hybrid-hf": {
        "hidden_size": 256, "shared_intermediate_size": 256, "intermediate_size": 256, "mamba_n_heads": 8,
        "head_dim": 64, "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2,
    },
    "nemotron-h-moe-hf": {
        "hidden_size": 256, "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256, "head_dim": 64,
        "mamba_num_heads": 8, "mamba_head_dim": 64,
    },
}  # fmt: skip


def write_blocks(folder: Path, name: str, kind: str, path: Path, **options: Any) -> Path:
    if not folder.exists():
        write(folder, name, **WIDE[name])

    def kind_of(tensor: str) -> str | None:
        return "F16" if tensor.endswith("ssm_dt.weight") else None  # as wide as the rank of dt

    return gguf_files.write_gguf(folder, path, kind, kind_of=kind_of, **options)


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """By gguf's own code."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.copy()).view(*reversed(tensor.shape.tolist()))
    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WIDE)
def test_logits_are_those_of_the_dequantised_weights(tmp_path: Path, name: str, kind: str) -> None:
    path = write_blocks(tmp_path / name, name, kind, tmp_path / "blocks.gguf")
    model = sm.load_model(path)
    format = {"Q5_0": "q8_0"}.get(kind, kind.lower())
    assert isinstance(model.embedding, BlockWeight) and model.embedding.format == format
    values = dequantised(path)
    plain = gguf_files.write_gguf(tmp_path / name, tmp_path / "f32.gguf", change=lambda name, _: values[name])
    exact = full_forward(sm.load_model(plain), IDS)
    error = (logits(model).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2e-5
    widened = sm.load_model(path, dtype="float32")
    assert torch.equal(logits(widened), logits(sm.load_model(plain))), "dtype gives what the blocks stand for, exactly"


def test_any_draft_leaves_the_text_as_it_is(tmp_path: Path) -> None:
    paths = {kind: write_blocks(tmp_path / "mamba", "mamba-hf", kind, tmp_path / f"{kind}.gguf") for kind in KINDS}
    drafts = [tmp_path / "mamba", write_blocks(tmp_path / "llama", "llama-hf", "Q4_0", tmp_path / "llama.gguf")]
    for kind, path in paths.items():
        text = greedy(sm.load_model(path))
        for draft in (*drafts, paths[KINDS[KINDS.index(kind) - 1]]):
            target, small = sm.load_pair(path, draft)
            assert greedy(target, draft=small) == text, (kind, draft)


def test_experts_in_blocks_are_read_once_and_leave_the_text_as_it_is(tmp_path: Path) -> None:
    """Of a file, and made when a folder or a file is loaded; with a draft, in logits and text."""
    folder = write(tmp_path / "moe", "granite-moe-hybrid-hf", **WIDE["granite-moe-hybrid-hf"])
    plain = gguf_files.write_gguf(folder, tmp_path / "f32.gguf")
    made = sm.load_model(folder, dtype="q8_0")
    experts = next(mixer for mixer in made.mixers if isinstance(mixer, Experts))
    assert {weight.format for weight in (experts.gate_proj, experts.up_proj, experts.down_proj)} == {"q8_0"}
    assert experts.router.dtype is torch.float32 and made.weight_bytes < 0.4 * sm.load_model(folder).weight_bytes
    assert torch.equal(logits(made), logits(sm.load_model(plain, dtype="q8_0")))
    path = write_blocks(folder, "granite-moe-hybrid-hf", "Q4_K", tmp_path / "q4_k.gguf")
    for target in (made, sm.load_model(path)):
        expected = sm.generate(target, [IDS[:5]], max_new_tokens=16, stop_token_ids=(), output_logits=True)
        for draft in (sm.load_model(folder), target):
            result = sm.generate(
                target, [IDS[:5]], draft=draft, max_new_tokens=16, stop_token_ids=(), output_logits=True
            )
            assert torch.equal(result.sequences[0], expected.sequences[0])
            assert torch.equal(result.logits[0], expected.logits[0])


def test_formats_are_refused_where_they_would_lose_bits_again(tmp_path: Path) -> None:
    folder = tmp_path / "mamba"
    path = write_blocks(folder, "mamba-hf", "Q8_0", tmp_path / "q8_0.gguf")
    with pytest.raises(ValueError, match=r"q8_0.gguf: .* is stored as q8_0, so it cannot become q4_0"):
        sm.load_model(path, dtype="q4_0")
    assert torch.equal(logits(sm.load_model(path, dtype="q8_0")), logits(sm.load_model(path)))
    plain = gguf_files.write_gguf(folder, tmp_path / "f32.gguf")
    assert torch.equal(logits(sm.load_model(plain, dtype="q8_0")), logits(sm.load_model(folder, dtype="q8_0")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_of_a_file_are_given_back_when_its_blocks_have_been_read(tmp_path: Path) -> None:
    write(tmp_path / "mamba", "mamba-hf", **WIDE["mamba-hf"] | {"vocab_size": 20000})
    path = write_blocks(tmp_path / "mamba", "mamba-hf", "Q8_0", tmp_path / "q8_0.gguf")
    size = path.stat().st_size
    model = sm.load_model(path)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    mapped = [at for at, line in enumerate(lines) if line.endswith(str(path))]
    resident = sum(int(lines[at + 2].split()[1]) * 1024 for at in mapped if lines[at + 2].startswith("Rss"))
    assert resident < 0.2 * size
    weights = [model.embedding, *model.weights()]
    assert sum(weight.nbytes for weight in weights if isinstance(weight, BlockWeight)) < 1.1 * size + os.sysconf(
        "SC_PAGESIZE"
    )


def test_only_matrices_may_be_in_blocks(tmp_path: Path) -> None:
    folder, name = write(tmp_path / "mamba", "mamba-hf", **WIDE["mamba-hf"]), "output_norm.weight"

    def kind_of(tensor: str) -> str | None:
        return "Q8_0" if tensor == name else None

    path = gguf_files.write_gguf(folder, tmp_path / "model.gguf", kind_of=kind_of)
    with pytest.raises(ValueError, match=rf"model.gguf: tensor {name} of shape \(256,\) is Q8_0; only matrices may be"):
        sm.load_model(path)
