"""Caches in files, and earlier states that a cache keeps: going on from either is one longer call, bit for bit."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

import speculative_mamba as sm
from speculative_mamba.testing.models import random_model, tiny_architecture, tiny_config
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OPTIONS = {"stop_token_ids": (), "output_logits": True}
KINDS = ("mamba1", "mamba2attn", "lfm2", "llama")


def models(kind, dtype=torch.float32):
    draft = random_model(tiny_config(d_model=16, n_layer=1), seed=1, dtype=dtype)
    return random_model(tiny_architecture(kind), dtype=dtype), draft


@pytest.fixture
def saved(tmp_path):
    """A file, and the cache that is in it."""
    target, draft = models("mamba2attn")
    cache = sm.GenerationCache(keep=2)
    sm.generate(target, [[5, 9, 3], [7]], draft=draft, max_new_tokens=5, cache=cache, **OPTIONS)
    cache.save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors", cache, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_from_a_file_goes_on(kind, dtype, tmp_path):
    """With models that were loaded anew."""
    prompts, path = [[5, 9, 3], [7, 1], [4, 4, 4, 4, 40]], tmp_path / "cache.safetensors"
    target, draft = models(kind, dtype)
    target.state_dtype = dtype
    cache = sm.GenerationCache(keep=3)
    sm.generate(target, prompts, draft=draft, max_new_tokens=6, cache=cache, **OPTIONS)
    cache.save(path)
    cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    target, draft = models(kind, dtype)
    target.state_dtype = dtype
    loaded = sm.GenerationCache.load(path)
    assert loaded.sequences == cache.sequences and loaded.keep == 3
    result = sm.generate(target, loaded.sequences, draft=draft, max_new_tokens=7, cache=loaded, **OPTIONS)
    expected = sm.generate(target, prompts, max_new_tokens=13, **OPTIONS)
    for row in range(3):
        assert result.sequences[row].tolist() == expected.sequences[row].tolist()
        assert_bitwise_equal(result.logits[row], expected.logits[row][6:], f"row {row}")
    again = sm.generate(target, prompts, draft=draft, max_new_tokens=4, cache=loaded, **OPTIONS)
    assert_bitwise_equal(again.logits[2], expected.logits[2][:4], "from what was kept")


def test_another_model_is_refused(saved):
    path, cache, _ = saved
    other = random_model(tiny_architecture("mamba2attn"), seed=3)
    with pytest.raises(ValueError, match="the cache belongs to another model"):
        sm.generate(other, cache.sequences, max_new_tokens=2, cache=sm.GenerationCache.load(path))


def changed_header(path, change):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    [key] = metadata
    description = json.loads(metadata[key])
    change(description)
    metadata[key] = json.dumps(description)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


BROKEN = {
    "missing": (lambda path: path.unlink(), "cannot be read as a saved GenerationCache"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as a saved GenerationCache"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a saved GenerationCache"),
    "pickle": (lambda path: torch.save({}, path), "cannot be read as a saved GenerationCache"),
    "weights": (lambda path: save_file({"a": torch.ones(2)}, path), "but no saved GenerationCache"),
    "a bit": (flip_last_byte, "is damaged"),
    "another number": (lambda path: changed_header(path, lambda d: d.update(rows=1)), "is damaged"),
    "a key less": (lambda path: changed_header(path, lambda d: d.pop("version")), "is damaged"),
    "version": (lambda path: changed_header(path, lambda d: d.update(version=2)), r"another version .* \(2, not 1\)"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_none(how, saved):
    break_it, message = BROKEN[how]
    break_it(saved[0])
    with pytest.raises(ValueError, match=message) as error:
        sm.GenerationCache.load(saved[0])
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written(saved, tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        saved[1].save(tmp_path / "nowhere" / "cache.safetensors")


@pytest.mark.parametrize("with_draft", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_text_goes_on_from_what_was_kept(kind, with_draft, assert_states_fit, monkeypatch):
    """The same prompt again, a turn that was edited, and the text before it. Only what is new is read."""
    target, draft = models(kind)
    draft = draft if with_draft else None
    cache, first, read = sm.GenerationCache(keep=9), [5, 9, 3, 8, 21], []
    prefill = sm.MambaLM.prefill
    monkeypatch.setattr(
        sm.MambaLM, "prefill", lambda self, t, *args: (self is target and read.append(len(t)), prefill(self, t, *args))
    )
    options = {"draft": draft, "max_new_tokens": 6, "cache": cache, **OPTIONS}
    answer = sm.generate(target, [first], **options).sequences[0].tolist()
    for prompt, new in ((first, 0), ([*answer, 4, 5, 6], 3), ([*answer, 4, 7, 7, 7], 4), (first, 0), (answer, 0)):
        read.clear()
        result = sm.generate(target, [prompt], **options)
        assert sum(read) == new
        assert_states_fit(cache)
        expected = sm.generate(target, [prompt], max_new_tokens=6, **OPTIONS)
        assert_bitwise_equal(result.logits[0], expected.logits[0], f"{prompt}")
    with pytest.raises(ValueError, match="the prompt of row 0 does not begin with its cache's"):
        sm.generate(target, [[6, 6, 6]], **options)


def test_only_the_newest_are_kept():
    target, _ = models("mamba1")
    cache = sm.GenerationCache(keep=2)
    text = sm.generate(target, [[5, 9]], max_new_tokens=3, cache=cache, **OPTIONS).sequences[0].tolist()
    sm.generate(target, [[*text, 1]], max_new_tokens=3, cache=cache, **OPTIONS)
    [kept] = cache.parts().kept
    assert [len(state.tokens) for state, _ in kept] == [5, 8]
    with pytest.raises(ValueError, match="does not begin with its cache's"):
        sm.generate(target, [[5, 9, 2]], max_new_tokens=3, cache=cache, **OPTIONS)


@pytest.mark.parametrize("keep", [-1, 1.5, None, True])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match="keep must be a whole number of at least 0"):
        sm.GenerationCache(keep=keep)
