"""Models with weights in blocks: the loaded model is the stored one with every matrix of full blocks quantized."""

import dataclasses
import re

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.layers.mamba1 import Mamba1Mixer
from speculative_mamba.ops.block_weight import BlockWeight, quantized
from speculative_mamba.testing import oracle

IN_BLOCKS, STAYS = ("in_proj", "x_proj", "out_proj"), ("dt_proj",)  # of 32 or 64 features, and of 3
layouts = pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "state-spaces"])
formats = pytest.mark.parametrize("format", ["q8_0", "q4_0"])


@pytest.fixture
def checkpoint(checkpoint):
    """Of a model 32 wide."""
    return lambda *layout, **config: checkpoint(*layout, **{"hidden_size": 32, **config})


def assert_quantized(actual: BlockWeight, stored: torch.Tensor, format: str) -> None:
    expected = quantized(stored, format)
    assert actual.format == format and torch.equal(actual.data, expected.data)


def assert_same(actual: torch.Tensor | None, stored: torch.Tensor | None) -> None:
    assert (actual is None) == (stored is None)
    assert actual is None or (actual.dtype == stored.dtype and torch.equal(actual, stored))


@formats
@layouts
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"use_bias": True}], ids=str)
def test_every_matrix_is_the_stored_one_quantized(checkpoint, layout, config, format, capsys):
    folder = checkpoint(layout, **config).folder
    stored, model = sm.load_model(folder), sm.load_model(folder, dtype=format)
    said = [line for line in capsys.readouterr().err.splitlines() if "speculative_mamba" in line]
    assert len(said) == 1, "said once"
    assert re.search(rf"layers\.0\.mixer\.dt_proj\.weight stays .* 3, .* 32, .* {format}", said[0])
    assert_quantized(model.embedding, stored.embedding, format)
    assert_quantized(model.head, stored.head, format)
    assert (model.head is model.embedding) == config.get("tie_word_embeddings", False)
    assert_same(model.norm_weight, stored.norm_weight)
    assert f"; d_model 32, 64 tokens; {format} weights of " in repr(model)
    for block, expected in zip(model.blocks, stored.blocks, strict=True):
        assert_same(block.norm_weight, expected.norm_weight)
        for name in (field.name for field in dataclasses.fields(Mamba1Mixer)):
            value, other = getattr(block.mixers[0], name), getattr(expected.mixers[0], name)
            if name in IN_BLOCKS:
                assert_quantized(value, other, format)
            elif name not in ("backend", "norm_eps"):
                assert_same(value, other)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_stays_keeps_its_dtype(checkpoint, stored):
    written = checkpoint("safetensors")
    written.oracle.to(stored).save_pretrained(written.folder)
    model = sm.load_model(written.folder, dtype="q8_0")
    mixer, kept = model.blocks[1].mixers[0], torch.float32 if stored is torch.float64 else stored
    for weight in (model.norm_weight, model.blocks[1].norm_weight, mixer.conv_weight, mixer.dt_proj):
        assert weight.dtype == kept
    for value in (mixer.A, mixer.D, mixer.dt_bias, mixer.conv_bias):
        assert value.dtype == torch.float32
    assert model.device == torch.device("cpu") and model.new_cache(1, 2)[0].states.dtype == torch.float32


@formats
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@layouts
def test_logits_are_those_of_the_rounded_weights(checkpoint, layout, backend, format):
    model = sm.load_model(checkpoint(layout).folder, dtype=format, backend=backend)
    assert model.backend == backend
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    actual = model.verify(torch.tensor([ids]), model.new_cache(1, len(ids)), torch.zeros(1, dtype=torch.int32))[0]
    exact = oracle.full_forward(model, ids)
    assert (actual - exact).norm() < 2e-5 * exact.norm()


@pytest.mark.parametrize(("format", "block"), [("q8_0", 34), ("q4_0", 18)])
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes(checkpoint, tied, format, block):
    """Of 32 weights 34 bytes or 18, scales up to a full line of a group; four for every other value."""
    model = sm.load_model(checkpoint(tie_word_embeddings=tied).folder, dtype=format)
    c, n_layer = model.config.blocks[0], len(model.config.blocks)
    d_model, vocabulary = model.config.d_model, model.vocab_size
    matrices = [(2 * c.d_inner, d_model), (c.dt_rank + 2 * c.d_state, c.d_inner), (d_model, c.d_inner)]

    def size(rows, columns):
        return -(-rows // 16) * (-(-columns // 64) * 64 + 16 * columns // 32 * (block - 2))

    others = c.d_inner * (c.d_conv + 1) + c.d_inner * (c.d_state + 2 + c.dt_rank) + d_model
    layer = sum(size(*matrix) for matrix in matrices) + 4 * others
    assert model.weight_bytes == n_layer * layer + size(vocabulary, d_model) + 4 * d_model


@formats
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_embedded_pair_is_lossless(state_dtype, format):
    """And its logits stay close to those of the stored weights."""
    target, draft = (sm.load_model(f"builtin:{m}", dtype=format, state_dtype=state_dtype) for m in ("target", "draft"))
    stored = sm.load_model("builtin:target", state_dtype=state_dtype)
    assert target.weight_bytes < (0.6 if format == "q8_0" else 0.4) * stored.weight_bytes
    prompts = [target.tokenizer.encode(text).ids for text in ("The morning was fine, and Elizabeth", "It")]
    result = sm.generate(target, prompts, draft=draft, max_new_tokens=40, output_logits=True)
    assert result.stats.acceptance_rate > 0.3
    for row, prompt in enumerate(prompts):
        plain = sm.generate(target, [prompt], max_new_tokens=40, output_logits=True)
        assert torch.equal(result.sequences[row], plain.sequences[0])
        assert torch.equal(result.logits[row], plain.logits[0])
        first = sm.generate(stored, [prompt], max_new_tokens=1, output_logits=True).logits[0][0]
        assert (plain.logits[0][0] - first).norm() < (0.02 if format == "q8_0" else 0.2) * first.norm()


def test_weights_that_cannot_be_in_blocks_are_named(checkpoint):
    written = checkpoint("safetensors")
    with torch.no_grad():
        written.oracle.backbone.layers[1].mixer.x_proj.weight[2, 3] = torch.nan
    written.oracle.save_pretrained(written.folder)
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.x_proj\.weight.*NaN") as caught:
        sm.load_model(written.folder, dtype="q8_0")
    assert "\n" not in str(caught.value) and str(written.folder) in str(caught.value)


def test_what_was_int8_is_named(checkpoint):
    with pytest.raises(
        ValueError, match=r"^unknown dtype 'int8'; choose from: float32, bfloat16, float16, q8_0, q4_0$"
    ):
        sm.load_model(checkpoint().folder, dtype="int8")


def test_the_state_cannot_be_in_blocks():
    with pytest.raises(ValueError, match=r"unknown state_dtype 'q8_0'; choose from: float32, bfloat16, float16$"):
        sm.load_model("builtin:draft", state_dtype="q8_0")
