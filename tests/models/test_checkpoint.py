"""Checkpoints of both public formats give the logits and the text that transformers gives."""

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import FORMATS

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
    assert model.vocab_size == stated
    with torch.no_grad():
        expected = written.oracle(torch.tensor([IDS])).logits[0, :, :stated]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "state-spaces"])
@pytest.mark.parametrize("stated", [True, None])
def test_a_stored_head_is_used_whatever_the_config_says(checkpoint, layout, stated):
    """As transformers does: tied are a head that is not stored, and one that equals the embedding."""
    written = checkpoint(layout)
    config = json.loads((written.folder / "config.json").read_text())
    key = "tie_embeddings" if layout == "state-spaces" else "tie_word_embeddings"
    config = {name: value for name, value in config.items() if name != key} | ({key: True} if stated else {})
    (written.folder / "config.json").write_text(json.dumps(config))
    assert_parity(sm.load_model(written.folder), written.oracle)
    assert_parity(sm.load_model(written.folder, mmap=False), written.oracle)


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_a_stored_head_that_equals_the_embedding_is_no_second_one(checkpoint, dtype):
    folder = checkpoint("state-spaces", tie_word_embeddings=True).folder
    model = sm.load_model(folder, dtype=dtype)
    assert model.head is model.embedding
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["lm_head.weight"] = -tensors["lm_head.weight"] * 0.0 + tensors["lm_head.weight"].nextafter(
        torch.tensor(9.0)
    )
    torch.save(tensors, folder / "pytorch_model.bin")
    changed = sm.load_model(folder)
    assert changed.head is not changed.embedding and torch.equal(changed.head, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("stated", "generation", "expected"),
    [
        (5, None, (5,)), (5, 7, (5, 7)), (5, [5, 7], (5, 7)), ([5, 6], [7, 5], (5, 6, 7)), (None, 7, (7,)),
        ("absent", [7], (7,)), ("absent", None, (0,)), (None, None, ()), (5, [], (5,)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
def test_ids_that_end_a_text(checkpoint, layout, stated, generation, expected):
    """Those of both files; the format's own where neither names one."""
    folder = checkpoint(layout).folder
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": stated}
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "do_sample": True}))
    model = sm.load_model(folder)
    assert sorted(model.config.eos_token_ids) == sorted(expected)
    plain = sm.generate(
        model, [IDS], max_new_tokens=40, stop_token_ids=(), sampling=sm.SamplingParams(seed=1, temperature=1)
    )
    text = sm.generate(model, [IDS], max_new_tokens=40, sampling=sm.SamplingParams(seed=1, temperature=1)).sequences[0]
    ends = [i for i, token in enumerate(plain.sequences[0].tolist()) if i >= len(IDS) and token in expected]
    assert len(text) == (ends[0] + 1 if ends else len(IDS) + 40)


def test_pickled_parameters_are_weights(checkpoint):
    """A file that was saved from ``named_parameters``: its tensors ask for gradients."""
    written = checkpoint("bin")
    expected = logits(sm.load_model(written.folder))
    torch.save(dict(written.oracle.named_parameters()), written.folder / "pytorch_model.bin")
    model = sm.load_model(written.folder)
    assert torch.equal(logits(model), expected) and not any(weight.requires_grad for weight in model.weights())


def test_computed_buffers_are_no_weights(checkpoint):
    from published import llama_hf
    from safetensors.torch import load_file, save_file

    folder = checkpoint().folder
    llama_hf(folder, 0)
    expected = logits(sm.load_model(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}, folder / "model.safetensors")
    assert torch.equal(logits(sm.load_model(folder)), expected)


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
    mixer = model.blocks[1].mixers[0]
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
    for weight in (model.embedding, model.head, model.blocks[0].mixers[0].in_proj, model.blocks[2].mixers[0].out_proj):
        assert any(begin <= weight.data_ptr() < end for begin, end in ranges), "a weight was copied"


def cut_short(path):
    os.truncate(path, path.stat().st_size - 4096)


def written_over(path):
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content[:-1])
    os.utime(path, ns=(0, 0))  # in place of waiting for the clock of the file system


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("harm", [cut_short, written_over])
def test_a_weights_file_that_changes_in_use_is_noticed(checkpoint, layout, harm):
    folder = checkpoint(layout, hidden_size=64).folder
    model, copied = sm.load_model(folder), sm.load_model(folder, mmap=False)
    cache, start = model.new_cache(1, 1), torch.zeros(1, dtype=torch.int32)
    expected = sm.generate(copied, [IDS], max_new_tokens=5).sequences[0]
    file = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[-1]
    harm(file)
    for call in (
        lambda: sm.generate(model, [IDS]),
        lambda: sm.generate(copied, [IDS], draft=model),
        lambda: model.prefill(IDS, cache, 0),
        lambda: model.verify(torch.tensor([[1]]), cache, start),
        lambda: sm.generate(model, [IDS[:1]]),  # of which nothing is read before a step
    ):
        with pytest.raises(ValueError, match=rf"{file.name} was cut short or written over .*mmap=False"):
            call()
    assert torch.equal(sm.generate(copied, [IDS], max_new_tokens=5).sequences[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weights_file_may_be_deleted_or_replaced_by_another(checkpoint, layout):
    folder = checkpoint(layout).folder
    model = sm.load_model(folder)
    expected = logits(model)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        other = folder / "other"
        other.write_bytes(b"other weights")
        other.replace(file)
        file.unlink()
    assert torch.equal(logits(model), expected)


def test_nothing_is_watched_that_was_copied(checkpoint):
    folder = checkpoint("sharded").folder
    assert len(sm.load_model(folder).files) > 1
    for options in ({"mmap": False}, {"mmap": False, "dtype": "bfloat16"}, {"mmap": False, "dtype": "q8_0"}):
        assert sm.load_model(folder, **options).files == ()


@pytest.mark.parametrize("dtype", [None, "q8_0"])
@pytest.mark.parametrize("name", [*FORMATS, "mamba-in-llama-merged", "builtin:target"])
def test_copies_of_a_model(name, dtype, tmp_path):
    """They hold their weights themselves, and each once."""
    if name in FORMATS:
        FORMATS[name](tmp_path, 0)
    elif name.endswith("merged"):
        FORMATS["mamba-in-llama"](tmp_path, 0, merged=True)
    model = sm.load_model(name if name.startswith("builtin") else tmp_path, dtype=dtype)
    pickled = pickle.dumps(model)
    size = model.weight_bytes + (0 if model.head is model.embedding else model.embedding.nbytes)
    assert len(pickled) < 1.2 * size + 100_000
    expected = logits(model)
    for file in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]:
        file.unlink()
    assert copy.copy(model).files == model.files and copy.copy(model).head is model.head
    for other in (pickle.loads(pickled), copy.deepcopy(model), pickle.loads(pickle.dumps(copy.copy(model)))):
        assert torch.equal(logits(other), expected)
        assert (other.head is other.embedding) == (model.head is model.embedding)
        assert other.vocabulary == model.vocabulary and other.files == ()
        assert ("tokenizer" in vars(other)) == ("tokenizer" in vars(model))


@pytest.mark.parametrize("mode", ["snapshots", "replay"])
@pytest.mark.parametrize("name", FORMATS)
def test_copies_of_a_cache(name, mode, tmp_path):
    """They go on by themselves, from any slot."""
    FORMATS[name](tmp_path, 0)
    model, start = sm.load_model(tmp_path, rollback=mode), torch.zeros(1, dtype=torch.int32)
    cache = model.new_cache(1, 4)
    model.prefill(IDS[:3], cache, 0)
    model.verify(torch.tensor([IDS[3:6]]), cache, start)
    others = [pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    expected = model.verify(torch.tensor([IDS[6:8]]), cache, start + 1)
    for other in others:
        assert type(other) is type(cache)
        assert torch.equal(model.verify(torch.tensor([IDS[6:8]]), other, start + 1), expected)
        assert all(map(torch.equal, cache[0].snapshot(0, 1), other[0].snapshot(0, 1)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_defaults_of_torch_change_nothing(name, dtype, tmp_path):
    FORMATS[name](tmp_path, 0)
    expected = logits(sm.load_model(tmp_path, dtype=dtype))
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model = sm.load_model(tmp_path, dtype=dtype)
            cache = model.new_cache(1, len(IDS))
        start = torch.zeros(1, dtype=torch.int32)
        assert torch.equal(model.verify(torch.tensor([IDS]), cache, start)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_is_shown_in_a_line(checkpoint):
    model = sm.load_model(checkpoint().folder)
    shown = repr(model)
    assert "\n" not in shown and len(shown) < 400 and "3 Mamba1Mixer" in shown and "float32" in shown
    assert len(repr(model.new_cache(1, 2))) < 100


MEASURE = """
import os, re, sys, torch, speculative_mamba as sm
torch.set_num_threads(1)
for dtype in (None, "bfloat16", "q8_0", "q4_0"):
    if os.fork() == 0:
        model = sm.load_model(sys.argv[1], dtype=dtype)
        sm.generate(model, [[1, 2, 3] * 30], max_new_tokens=2)
        # Not ru_maxrss: a new process starts with its parent's.
        peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        print(model.weight_bytes, peak, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["safetensors", "state-spaces"])
def test_peak_memory(tmp_path, layout):
    """400 MB of float32 weights: at most the weights, 20 % and 300 MB, as stored and converted."""
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
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    kinds = {"as stored": 1, "bfloat16": 0.5, "q8_0": 0.26, "q4_0": 0.14}
    for line, (dtype, factor) in zip(done.stdout.splitlines(), kinds.items(), strict=True):
        weights, peak = map(int, line.split())
        assert weights > 350e6 * factor
        assert peak <= 1.2 * weights + 300e6, f"{dtype}: peak {peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"


@pytest.mark.parametrize(
    ("source", "revision", "word"),
    [
        ("builtin:target", "main", "^only a hub id has revisions"), ("folder", "main", "^only a hub id has revisions"),
        ("someone/tiny-mamba", "", "revision must be"), ("someone/tiny-mamba", 3, "revision must be"),
    ],
)  # fmt: skip
def test_revisions_that_cannot_be(source, revision, word, tmp_path):
    for load in (sm.load_model, lambda source, revision: sm.load_pair(source, "./absent", revision=revision)):
        with pytest.raises(ValueError, match=word):
            load(tmp_path if source == "folder" else source, revision=revision)


def test_hub_id_from_the_cache_without_a_network(checkpoint, tmp_path):
    """The hub's own layout under HF_HOME, blobs and links to them; huggingface_hub reads the environment when imported.

    Catches: a revision that is not passed on.
    """
    hub = tmp_path / "hub" / "models--someone--tiny-mamba"
    for folder in ("blobs", "refs"):
        (hub / folder).mkdir(parents=True)
    folders = {"main": checkpoint("safetensors").folder, "v1": checkpoint("sharded", seed=1).folder}
    commits = {name: str(number) * 40 for number, name in enumerate(folders)}
    for name, commit in commits.items():
        (hub / "refs" / name).write_text(commit)
        (hub / "snapshots" / commit).mkdir(parents=True)
        for file in folders[name].iterdir():
            blob = hashlib.sha256(file.read_bytes()).hexdigest()
            (hub / "blobs" / blob).write_bytes(file.read_bytes())
            (hub / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob}")
    program = f"""
import speculative_mamba as sm
def show(*source, **options):
    try:
        model = sm.load_model(*source, **options)
        print(model.name, sm.generate(model, [[1, 2, 3]], max_new_tokens=5).sequences[0].tolist())
    except ValueError as error:
        print(error)
show("someone/tiny-mamba")
show("someone/tiny-mamba", revision="v1")
show("someone/tiny-mamba", revision="{commits["v1"]}")
show("{hub / "snapshots" / commits["v1"]}")
show("someone/tiny-mamba", revision="v2")
show("someone/absent")
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    main, v1 = (
        sm.generate(sm.load_model(folder), [[1, 2, 3]], max_new_tokens=5).sequences[0].tolist()
        for folder in folders.values()
    )
    assert main != v1
    assert lines[:3] == [f"someone/tiny-mamba {main}", f"someone/tiny-mamba {v1}", f"someone/tiny-mamba {v1}"]
    assert lines[3].endswith(f"{commits['v1']} {v1}") and len(lines) == 6
    assert "someone/tiny-mamba" in lines[4] and "revision 'v2'" in lines[4]
    assert "someone/absent" in lines[5] and "folder" in lines[5], "one line that says what to do"


@pytest.mark.parametrize("options", [{}, {"dtype": "q8_0"}, {"mmap": False}], ids=str)
def test_loading_tells_how_far_it_is(options):
    told = []
    models = sm.load_pair("builtin:target", "builtin:draft", on_load=lambda *what: told.append(what), **options)
    for model in models:
        shares = [share for source, share in told if source == model.name]
        assert shares == sorted(set(shares)) and 0 < shares[0] < 0.2 and shares[-1] == 1
