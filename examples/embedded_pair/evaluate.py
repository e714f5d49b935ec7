"""Bits per byte of exported models on the held-out novel, and how often the draft is right.

    python -m examples.embedded_pair.evaluate --text TEXT --target builtin/target --draft builtin/draft

TEXT is the folder written by ``examples.embedded_pair.corpus``.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.embedded_pair.data import bits_per_byte, read
from examples.embedded_pair.distill import acceptance
from examples.embedded_pair.model import ByteMamba, Size


def load_exported(folder: Path) -> ByteMamba:
    """The model that ``examples.embedded_pair.export`` wrote, its rounded weights as float32."""
    config = json.loads((folder / "config.json").read_text())
    model = ByteMamba(Size(config["hidden_size"], config["num_hidden_layers"], config["time_step_rank"]))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


@torch.no_grad()
def overlap(target: ByteMamba, draft: ByteMamba, text: Tensor, length: int = 1024, rows: int = 32) -> float:
    """Mean of sum(min(p, q)) over ``text`` (size) uint8: the chance that speculative sampling keeps a drafted byte."""
    windows = text[: len(text) // length * length].view(-1, length)
    windows = windows[:: max(1, len(windows) // rows)].long()
    total = 0.0
    for part in windows.split(8):
        p, q = torch.softmax(target(part), -1), torch.softmax(draft(part), -1)
        total += float(torch.minimum(p, q).sum())
    return total / windows.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    options = parser.parse_args()
    held_out = read(options.text / "heldout.bin")
    target, draft = load_exported(options.target), load_exported(options.draft)
    for name, model in (("target", target), ("draft", draft)):
        bits = bits_per_byte(model, held_out)
        print(f"{name}: {model.parameter_count} parameters, {bits:.3f} bits per byte on the held-out novel")
    print(f"acceptance, greedy: {acceptance(target, draft, held_out):.3f}")
    print(f"acceptance, sampled at temperature 1: {overlap(target, draft, held_out):.3f}")


if __name__ == "__main__":
    main()
