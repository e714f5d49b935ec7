"""GGUF files that are cut short, changed, of an unknown kind or make no sense: one line that says what is wrong."""

import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import logits, write

import speculative_mamba as sm
from speculative_mamba.models.gguf.header import read_header

gguf_files = pytest.importorskip("speculative_mamba.testing.gguf_files", reason="needs the gguf package")
CASES = int(os.environ.get("SPECULATIVE_MAMBA_FUZZ", 300))


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        sm.load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and path.name in message
    for word in words:
        assert word in message, message


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, code: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + value


def header(*entries: bytes, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, count, len(entries)) + b"".join(entries) + tensors


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LAMA = entry("general.architecture", 8, text("llama"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """files(name, kind, **options): a file of the tiny model of a format."""
    folder = tmp_path_factory.mktemp("gguf")
    checkpoints: dict[str, Path] = {}

    def make(name: str = "llama-hf", kind: str = "F32", **options: Any) -> Path:
        if name not in checkpoints:
            checkpoints[name] = write(folder / name, name)
        return gguf_files.write_gguf(checkpoints[name], folder / f"{random.random()}.gguf", kind, **options)

    return make


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no GGUF file"]),
        (b"GG", ["no GGUF file"]),
        (b"safetensors", ["no GGUF file"]),
        (b"GGUF", ["beyond the end of the file (4 bytes)"]),
        (b"GGUF\3\0\0\0", ["beyond the end of the file"]),
        (header(version=1), ["version 1 is not supported"]),
        (header(version=4), ["version 4 is not supported"]),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), ["big-endian"]),
        (header(), ["general.architecture None is not supported", "mamba2"]),
        (header(entry("general.architecture", 8, text("qwen2"))), ["'qwen2' is not supported", "falcon-h1"]),
        (header(entry("general.architecture", 4, b"\1\0\0\0")), ["general.architecture 1 is not supported"]),
        (header(LAMA, LAMA), ["general.architecture is there twice"]),
        (header(LAMA), ["its metadata gives llama.block_count = None"]),
        (header(LAMA, entry("llama.block_count", 4, b"\xff\xff\xff\xff")), ["llama.block_count = 4294967295"]),
        (header(LAMA, entry("llama.block_count", 6, b"\0\0\x80\x3f")), ["llama.block_count = 1.0"]),
        (header(entry("x", 77, b"")), ["metadata x is of the unknown type 77"]),
        (header(entry("x", 9, struct.pack("<IQ", 9, 1))), ["x is an array of arrays"]),
        (header(entry("x", 9, struct.pack("<IQ", 8, 2**60))), ["beyond the end"]),
        (header(entry("x", 9, struct.pack("<IQ", 12, 2**62))), ["beyond the end"]),
        (header(entry("x", 8, struct.pack("<Q", 2**63))), ["beyond the end"]),
        (header(entry("x", 8, struct.pack("<Q", 2) + b"\xff\xff")), ["not UTF-8"]),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), ["beyond the end"]),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**64 - 1, 0), ["beyond the end"]),
        (header(LAMA, entry("split.count", 2, b"\2\0")), ["one of several parts", "llama-gguf-split --merge"]),
        (header(tensors=struct.pack("<Q", 2000) + b"a" * 2000, count=1), ["a name that is none"]),
        (header(tensors=tensor("a", 1), count=1), ["tensor a ends at byte", "download it again"]),
        (header(tensors=tensor("a", 1) * 2, count=2), ["tensor a is there twice"]),
        (header(tensors=tensor("a", 1, offset=8), count=1), ["tensor a of shape (1,) lies at byte 8"]),
        (header(tensors=tensor("a", 0), count=1), ["tensor a of shape (0,)"]),
        (header(tensors=tensor("a", 2**63, 2**63), count=1), ["tensor a ends at byte"]),
        (header(tensors=tensor("a", 1, 1, 1, 1, 1), count=1), ["tensor a has 5 dimensions"]),
        (header(tensors=tensor("a"), count=1), ["tensor a has 0 dimensions"]),
        (header(tensors=tensor("a", 32, kind=13), count=1), ["tensor a is of type Q5_K", "Q4_K"]),
        (header(tensors=tensor("a", 32, kind=77), count=1), ["tensor a is of type number 77"]),
        (header(tensors=tensor("a", 33, kind=8), count=1), ["rows of 33 weights, no multiple of 32 as Q8_0 needs"]),
        (header(entry("general.alignment", 4, b"\3\0\0\0")), ["general.alignment is 3"]),
        (header(entry("general.alignment", 8, text("a"))), ["general.alignment is 'a'"]),
    ],
)
def test_headers_that_are_broken(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, *words)


def test_a_file_of_another_name_is_known_by_its_first_bytes(files: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(files().read_bytes())
    assert logits(sm.load_model(path)).isfinite().all()
    path.write_bytes(b"text")
    refused(path, "no GGUF file", "give the folder")
    with pytest.raises(ValueError, match=r"file 'absent.gguf' does not exist"):
        sm.load_model("absent.gguf")
    with pytest.raises(ValueError, match=r"has no config.json; .* GGUF file .*\.gguf"):
        sm.load_model(files().parent)
    with pytest.raises(ValueError, match="only a hub id has revisions"):
        sm.load_model(files(), revision="main")


def test_a_file_that_is_cut_short(files: Callable[..., Path], tmp_path: Path) -> None:
    content, path = files().read_bytes(), tmp_path / "short.gguf"
    for length in (40, len(content) // 8, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "download it again")


@pytest.mark.parametrize(
    ("name", "metadata", "words"),
    [
        ("llama-hf", {"llama.attention.layer_norm_rms_epsilon": None}, ["layer_norm_rms_epsilon = None"]),
        ("llama-hf", {"llama.attention.head_count": 5}, ["llama.attention.head_count = 5"]),
        ("llama-hf", {"llama.attention.head_count": "four"}, ["llama.attention.head_count = 'four'"]),
        ("llama-hf", {"llama.attention.head_count_kv": [2, 2, 2]}, ["3 llama.attention.head_count_kv, but 2 layers"]),
        ("llama-hf", {"llama.rope.scaling.type": "yarn"}, ["llama.rope.scaling.type = 'yarn'"]),
        ("llama-hf", {"llama.rope.dimension_count": 4}, ["llama.rope.dimension_count = 4"]),
        ("llama-hf", {"llama.block_count": 3}, ["the weights lack blk.2.", "its metadata calls for"]),
        ("llama-hf", {"llama.block_count": 1}, ["the weights hold 'blk.1.", "which its metadata does not call for"]),
        (
            "llama-hf",
            {"llama.feed_forward_length": 40},
            ["ffn_gate.weight has shape (37, 24)", "metadata gives (40, 24)"],
        ),
        ("llama-hf", {"llama.attention.value_length": 9}, ["llama.attention.value_length = 9"]),
        ("mamba2-hf", {"mamba2.ssm.group_count": 4}, ["mamba2.ssm.group_count: 6 is not a multiple of 4"]),
        ("mamba2-hf", {"mamba2.ssm.group_count": None}, ["mamba2.ssm.group_count = None"]),
        ("mamba2-hf", {"mamba2.ssm.state_size": 2**20}, ["mamba2.ssm.state_size = 1048576"]),
        ("mamba2-hf", {"mamba2.ssm.conv_kernel": 1}, ["mamba2.ssm.conv_kernel = 1"]),
        ("granite-hf", {"granite.residual_scale": -1.0}, ["granite.residual_scale = -1.0"]),
        ("lfm2-hf", {"lfm2.attention.head_count_kv": [0, 0, 0]}, ["the weights lack blk.1.shortconv.in_proj.weight"]),
        ("granite-moe-hf", {"granitemoe.expert_count": None}, ["granitemoe.expert_count = None"]),
        ("granite-moe-hf", {"granitemoe.expert_count": 2**31}, ["granitemoe.expert_count = 2147483648"]),
        ("granite-moe-hf", {"granitemoe.expert_count": 5}, ["has shape (6, 13, 24)", "gives (5, 13, 24)"]),
        ("granite-moe-hf", {"granitemoe.expert_used_count": 7}, ["granitemoe.expert_used_count = 7", "1 to 6"]),
        ("granite-moe-hf", {"granitemoe.expert_weights_scale": 2.0}, ["granitemoe.expert_weights_scale = 2.0"]),
        ("jamba-moe-hf", {"jamba.expert_gating_func": 2}, ["jamba.expert_gating_func = 2"]),
        ("jamba-moe-hf", {"jamba.feed_forward_length": 21}, ["gives (21, 24)"]),
        (
            "nemotron-h-moe-hf",
            {"nemotron_h_moe.expert_group_count": 5},
            ["expert_group_count: 12 is not a multiple of 5"],
        ),
        ("nemotron-h-moe-hf", {"nemotron_h_moe.expert_group_count": 12}, ["group_count = 12", "at least two"]),
        ("nemotron-h-moe-hf", {"nemotron_h_moe.nextn_predict_layers": 1}, ["nextn_predict_layers = 1"]),
        ("nemotron-h-moe-hf", {"nemotron_h_moe.moe_latent_size": 8}, ["moe_latent_size = 8"]),
        (
            "granite-moe-hybrid-hf",
            {"granitehybrid.expert_shared_feed_forward_length": 1},
            ["ffn_gate_shexp", "(1, 24)"],
        ),
    ],
)
def test_metadata_that_make_no_sense(
    files: Callable[..., Path], name: str, metadata: dict[str, Any], words: list[str]
) -> None:
    refused(files(name, metadata=metadata), *words)


def test_experts_of_other_architectures_are_refused(files: Callable[..., Path]) -> None:
    path = files(tensors={"blk.0.ffn_up_exps.weight": torch.ones(2)})
    refused(
        path, "mixture of experts", "blk.0.ffn_up_exps.weight", "not supported for llama; supported for: granitemoe"
    )


@pytest.mark.parametrize("factors", [torch.ones(2), torch.tensor([1.0, -1.0, 1.0]), torch.ones(3, 1)])
def test_factors_of_rotary_frequencies_that_do_not_fit(files: Callable[..., Path], factors: torch.Tensor) -> None:
    refused(files(tensors={"rope_freqs.weight": factors}), "rope_freqs.weight")


def test_alignments(files: Callable[..., Path]) -> None:
    expected = logits(sm.load_model(files()))
    for alignment in (8, 64, 4096):
        assert torch.equal(logits(sm.load_model(files(alignment=alignment))), expected)


def test_a_file_that_is_changed_while_it_is_mapped(files: Callable[..., Path]) -> None:
    path = files()
    model = sm.load_model(path)
    expected, content = logits(model), path.read_bytes()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(content[:100])
    assert torch.equal(logits(model), expected), "another file of the same name does no harm"
    path.with_suffix(".old").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"cut short or written over .*mmap=False"):
        logits(model)


def mutated(content: bytes, rng: random.Random, end: int) -> bytes:
    """A few bytes of the header are others, or some are gone, or there are more."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(end)
        kind = rng.random()
        if kind < 0.6:
            changed[at] = rng.choice([0, 1, 2, 9, 127, 255, changed[at] ^ 1 << rng.randrange(8)])
        elif kind < 0.8:
            changed[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1]))
        elif kind < 0.9:
            del changed[at : at + rng.randint(1, 40)]
        else:
            changed[at:at] = rng.randbytes(rng.randint(1, 20))
    return bytes(changed)


def test_changed_headers_load_or_are_refused_in_one_line(files: Callable[..., Path], tmp_path: Path) -> None:
    rng, path, loaded = random.Random(0), tmp_path / "changed.gguf", 0
    for name in ("llama-hf", "granite-hybrid-hf", "mamba2-hf", "nemotron-h-moe-hf"):
        source = files(name)
        content, end = source.read_bytes(), min(info.offset for info in read_header(source).tensors.values())
        for _ in range(CASES // 4):
            path.write_bytes(mutated(content, rng, end))
            started = time.perf_counter()
            try:
                sm.load_model(path)
                loaded += 1
            except ValueError as error:
                assert "\n" not in str(error) and path.name in str(error) and len(str(error)) < 600
            assert time.perf_counter() - started < 5
    assert 0 < loaded < CASES // 2
