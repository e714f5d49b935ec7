"""Writes a trained model as a Hugging Face ``MambaForCausalLM`` folder: config.json, model.safetensors, tokenizer.json.

    python -m examples.embedded_pair.export OUT/target/final.pt speculative_mamba/models/builtin/target

Matrices and norms become bfloat16; A_log, D and the bias of the time step stay float32. The tokenizer maps every byte
to the token of the same number.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples.embedded_pair.model import EPSILON, STATES, TAPS, VOCABULARY, ByteMamba, load

KEPT_FLOAT32 = ("A_log", ".D", "dt_proj.bias")


def config(model: ByteMamba) -> dict[str, object]:
    size = model.size
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "state_size": STATES,
        "conv_kernel": TAPS,
        "expand": 2,
        "intermediate_size": size.inner,
        "time_step_rank": size.dt_rank,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "rms_norm": True,
        "residual_in_fp32": True,
        "layer_norm_epsilon": EPSILON,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte: itself, or one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, spare = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return characters


def byte_tokenizer() -> Tokenizer:
    """Tokenizer whose token numbers are the bytes of the UTF-8 text."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def rounded(model: ByteMamba) -> dict[str, torch.Tensor]:
    """The exported tensors by name."""
    return {
        name: (tensor.float() if name.endswith(KEPT_FLOAT32) else tensor.bfloat16()).contiguous()
        for name, tensor in model.state_dict().items()
    }


def export(model: ByteMamba, folder: Path) -> None:
    """Replaces ``folder`` as a whole."""
    scratch = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(config(model), indent=2) + "\n")
    save_file(rounded(model), scratch / "model.safetensors", metadata={"format": "pt"})
    (scratch / "model.safetensors").chmod(0o644)
    byte_tokenizer().save(str(scratch / "tokenizer.json"))
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model, _ = load(options.rollback)
    export(model, options.folder)
    print(f"{options.folder}: {model.parameter_count} parameters")


if __name__ == "__main__":
    main()
