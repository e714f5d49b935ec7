"""Checkpoints of both public formats give the logits and the text that transformers gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import speculative_mamba as sm

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
LAYOUTS = ("safetensors", "sharded", "bin", "state-spaces")


def logits(model, ids=IDS):
    cache = model.new_cache(1, len(ids))
    return model.verify(torch.tensor([ids]), cache, torch.zeros(1, dtype=torch.int32))[0]


def assert_parity(model, oracle):
    """Logits are close, and every token of the greedy text is the one transformers finds likeliest there."""
    result = sm.generate(model, [IDS], draft=model, max_new_tokens=20, stop_token_ids=(), output_logits=True)
    text = result.sequences[0]
    with torch.no_grad():
        expected = oracle(text[None, :-1]).logits[0]
    assert text[len(IDS) :].tolist() == expected[len(IDS) - 1 :].argmax(-1).tolist()
    assert len(set(text.tolist()[len(IDS) :])) > 3, "a text of one token would show little"
    torch.testing.assert_close(logits(model), expected[: len(IDS)], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(result.logits[0], expected[len(IDS) - 1 :], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_transformers(checkpoint, layout, backend):
    written = checkpoint(layout)
    assert_parity(sm.load_model(written.folder, backend=backend), written.oracle)


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
@pytest.mark.parametrize(
    "config",
    [
        {"use_bias": True},
        {"use_conv_bias": False},
        {"conv_kernel": 2, "state_size": 16},
        {"hidden_size": 40, "time_step_rank": 1, "num_hidden_layers": 1},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_parity_of_other_shapes(checkpoint, layout, config):
    ssm = {"conv_bias": config.get("use_conv_bias", True)}
    written = checkpoint(layout, **config)
    if layout == "state-spaces":
        known = json.loads((written.folder / "config.json").read_text())["ssm_cfg"]
        written.change_config(ssm_cfg=known | ssm)
    model = sm.load_model(written.folder)
    tied = config.get("tie_word_embeddings", False)
    assert (model.head.data_ptr() == model.embedding.data_ptr()) == tied
    if not tied:
        assert_parity(model, written.oracle)
    else:
        with torch.no_grad():
            torch.testing.assert_close(
                logits(model), written.oracle(torch.tensor([IDS])).logits[0], rtol=1e-4, atol=2e-4
            )


def test_default_rank_and_sizes(checkpoint):
    """dt_rank "auto" is d_model / 16 rounded up, in both formats."""
    written = checkpoint("safetensors", hidden_size=40, time_step_rank="auto")
    assert sm.load_model(written.folder).config.blocks[0].dt_rank == 3
    assert_parity(sm.load_model(written.folder), written.oracle)


@pytest.mark.parametrize("stated", [57, 63])
def test_state_spaces_vocabularies_are_padded_to_a_multiple_of_8(checkpoint, stated):
    written = checkpoint("state-spaces", {"vocab_size": stated})
    model = sm.load_model(written.folder)
    assert model.vocab_size == 64
    assert_parity(model, written.oracle)


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
def test_extra_keys_do_not_matter(checkpoint, layout):
    written = checkpoint(layout)
    written.change_config(
        _name_or_path="x", d_intermediate=0, attn_cfg={}, attn_layer_idx=[], torch_dtype="float32", rescale=[1]
    )
    assert_parity(sm.load_model(written.folder), written.oracle)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", torch.float16], ids=str)
def test_dtypes(checkpoint, stored, dtype):
    """Weights take the dtype asked for; what the recurrence depends on is float32 always, and A is exact."""
    written = checkpoint("safetensors")
    A = -torch.exp(written.oracle.state_dict()["backbone.layers.1.mixer.A_log"].to(stored).float())
    written.oracle.to(stored).save_pretrained(written.folder)
    model = sm.load_model(written.folder, dtype=dtype)
    expected = {None: stored, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.float16)
    mixer = model.blocks[1].mixer
    for weight in (model.embedding, model.head, mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
        assert weight.dtype == expected
    for value in (mixer.A, mixer.D, mixer.dt_bias, mixer.conv_bias):
        assert value.dtype == torch.float32
    assert torch.equal(mixer.A, A)
    out = logits(model)
    assert out.dtype == torch.float32
    with torch.no_grad():
        reference = written.oracle.float()(torch.tensor([IDS])).logits[0]
    error = (out - reference).abs().max() / reference.abs().max()
    assert error < (0.05 if torch.bfloat16 in (stored, expected) else 0.01)


@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
def test_weights_lie_in_the_mapped_file(checkpoint, layout):
    written = checkpoint(layout)
    model = sm.load_model(written.folder)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    ranges = []
    for line in maps.read_text().splitlines():
        if str(written.folder) in line:
            begin, end = line.split()[0].split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    for weight in (model.embedding, model.head, model.blocks[0].mixer.in_proj, model.blocks[2].mixer.out_proj):
        assert any(begin <= weight.data_ptr() < end for begin, end in ranges), "a weight was copied"


MEASURE = """
import re, sys, torch, speculative_mamba as sm
torch.set_num_threads(1)
dtype = None if sys.argv[2] == "None" else sys.argv[2]
model = sm.load_model(sys.argv[1], dtype=dtype)
sm.generate(model, [[1, 2, 3] * 30], max_new_tokens=2)
# Not ru_maxrss: a new process starts with its parent's.
print(model.weight_bytes, 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
def test_peak_memory(tmp_path, layout):
    """400 MB of float32 weights: at most the weights, 20 % and 300 MB, as stored and converted to bfloat16 and int8."""
    config = {"model_type": "mamba", "hidden_size": 1024, "num_hidden_layers": 14, "vocab_size": 4096}
    shapes = {
        "in_proj.weight": (4096, 1024), "conv1d.weight": (2048, 1, 4), "conv1d.bias": (2048,),
        "x_proj.weight": (96, 2048), "dt_proj.weight": (2048, 64), "dt_proj.bias": (2048,), "A_log": (2048, 16),
        "D": (2048,), "out_proj.weight": (1024, 2048),
    }  # fmt: skip
    tensors = {"backbone.embeddings.weight": torch.zeros(4096, 1024), "backbone.norm_f.weight": torch.ones(1024)}
    for layer in range(14):
        tensors[f"backbone.layers.{layer}.norm.weight"] = torch.ones(1024)
        for name, shape in shapes.items():
            tensors[f"backbone.layers.{layer}.mixer.{name}"] = torch.full(shape, 0.001)
    if layout == "safetensors":
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "model.safetensors")
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        config = {"d_model": 1024, "n_layer": 14, "vocab_size": 4096}
    del tensors
    (tmp_path / "config.json").write_text(json.dumps(config))
    for dtype, factor in (("None", 1), ("bfloat16", 0.5), ("int8", 0.25)):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), dtype], capture_output=True, text=True, check=True
        )
        weights, peak = map(int, done.stdout.split())
        assert weights > 350e6 * factor
        assert peak <= 1.2 * weights + 300e6, f"{dtype}: peak {peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"


def test_hub_id_from_the_cache_without_a_network(checkpoint, tmp_path):
    """The hub's own folder layout under HF_HOME; huggingface_hub reads the environment when imported."""
    written = checkpoint("safetensors")
    snapshot = tmp_path / "hub" / "models--someone--tiny-mamba" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    for file in written.folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    program = """
import speculative_mamba as sm
model = sm.load_model("someone/tiny-mamba")
print(model.name, sm.generate(model, [[1, 2, 3]], max_new_tokens=5).sequences[0].tolist())
try:
    sm.load_model("someone/absent")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = sm.generate(sm.load_model(written.folder), [[1, 2, 3]], max_new_tokens=5).sequences[0].tolist()
    assert lines[0] == f"someone/tiny-mamba {expected}"
    assert len(lines) == 2 and "someone/absent" in lines[1] and "folder" in lines[1], "one line that says what to do"
