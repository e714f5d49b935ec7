"""Models with int8 weights: the loaded model is the stored one with every matrix quantised, and nothing else."""

import dataclasses

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.layers.mamba1 import Mamba1Mixer
from speculative_mamba.ops.int8 import Int8Weight, quantised
from speculative_mamba.testing import oracle

MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
layouts = pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "state-spaces"])


def assert_quantised(actual: Int8Weight, stored: torch.Tensor) -> None:
    expected = quantised(stored)
    assert torch.equal(actual.values, expected.values) and torch.equal(actual.scale, expected.scale)


def assert_same(actual: torch.Tensor | None, stored: torch.Tensor | None) -> None:
    assert (actual is None) == (stored is None)
    assert actual is None or (actual.dtype == stored.dtype and torch.equal(actual, stored))


@layouts
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"use_bias": True}], ids=str)
def test_every_matrix_is_the_stored_one_quantised(checkpoint, layout, config):
    folder = checkpoint(layout, **config).folder
    stored, model = sm.load_model(folder), sm.load_model(folder, dtype="int8")
    assert_quantised(model.embedding, stored.embedding)
    assert_quantised(model.head, stored.head)
    assert (model.head is model.embedding) == config.get("tie_word_embeddings", False)
    assert_same(model.norm_weight, stored.norm_weight)
    for block, expected in zip(model.blocks, stored.blocks, strict=True):
        assert_same(block.norm_weight, expected.norm_weight)
        for name in (field.name for field in dataclasses.fields(Mamba1Mixer)):
            value, other = getattr(block.mixers[0], name), getattr(expected.mixers[0], name)
            if name in MATRICES:
                assert_quantised(value, other)
            elif name not in ("backend", "norm_eps"):
                assert_same(value, other)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_stays_keeps_its_dtype(checkpoint, stored):
    written = checkpoint("safetensors")
    written.oracle.to(stored).save_pretrained(written.folder)
    model = sm.load_model(written.folder, dtype=torch.int8)
    mixer, kept = model.blocks[1].mixers[0], torch.float32 if stored is torch.float64 else stored
    for weight in (model.embedding, model.head, *(getattr(mixer, name) for name in MATRICES)):
        assert weight.dtype == torch.int8
    for weight in (model.norm_weight, model.blocks[1].norm_weight, mixer.conv_weight):
        assert weight.dtype == kept
    for value in (mixer.A, mixer.D, mixer.dt_bias, mixer.conv_bias):
        assert value.dtype == torch.float32
    assert model.device == torch.device("cpu") and model.new_cache(1, 2)[0].states.dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@layouts
def test_logits_are_those_of_the_rounded_weights(checkpoint, layout, backend):
    model = sm.load_model(checkpoint(layout).folder, dtype="int8", backend=backend)
    assert model.backend == backend
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    actual = model.verify(torch.tensor([ids]), model.new_cache(1, len(ids)), torch.zeros(1, dtype=torch.int32))[0]
    exact = oracle.full_forward(model, ids)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes(checkpoint, tied):
    """A byte for every value of a matrix, four for every row of it and for every value of the rest."""
    model = sm.load_model(checkpoint(tie_word_embeddings=tied).folder, dtype="int8")
    c, n_layer = model.config.blocks[0], len(model.config.blocks)
    d_model, vocabulary = model.config.d_model, model.vocab_size
    matrices = [(2 * c.d_inner, d_model), (c.dt_rank + 2 * c.d_state, c.d_inner), (c.d_inner, c.dt_rank)]
    matrices.append((d_model, c.d_inner))
    others = c.d_inner * (c.d_conv + 1) + c.d_inner * (c.d_state + 2) + d_model
    block = sum(rows * columns + 4 * rows for rows, columns in matrices) + 4 * others
    assert model.weight_bytes == n_layer * block + vocabulary * (d_model + 4) + 4 * d_model


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_embedded_pair_is_lossless(state_dtype):
    """And its logits stay close to those of the stored weights."""
    target, draft = (sm.load_model(f"builtin:{m}", dtype="int8", state_dtype=state_dtype) for m in ("target", "draft"))
    stored = sm.load_model("builtin:target", state_dtype=state_dtype)
    assert target.weight_bytes < 0.6 * stored.weight_bytes
    prompts = [target.tokenizer.encode(text).ids for text in ("The morning was fine, and Elizabeth", "It")]
    result = sm.generate(target, prompts, draft=draft, max_new_tokens=40, output_logits=True)
    assert result.stats.acceptance_rate > 0.3
    for row, prompt in enumerate(prompts):
        plain = sm.generate(target, [prompt], max_new_tokens=40, output_logits=True)
        assert torch.equal(result.sequences[row], plain.sequences[0])
        assert torch.equal(result.logits[row], plain.logits[0])
        first = sm.generate(stored, [prompt], max_new_tokens=1, output_logits=True).logits[0][0]
        assert (plain.logits[0][0] - first).norm() < 0.1 * first.norm()


def test_weights_that_cannot_be_int8_are_named(checkpoint):
    written = checkpoint("safetensors")
    with torch.no_grad():
        written.oracle.backbone.layers[1].mixer.x_proj.weight[2, 3] = torch.nan
    written.oracle.save_pretrained(written.folder)
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.x_proj\.weight.*NaN") as caught:
        sm.load_model(written.folder, dtype="int8")
    assert "\n" not in str(caught.value) and str(written.folder) in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", torch.int8], ids=str)
def test_the_state_cannot_be_int8(dtype):
    with pytest.raises(ValueError, match=r"unknown state_dtype '.*int8'; choose from: float32, bfloat16, float16$"):
        sm.load_model("builtin:draft", state_dtype=dtype)
