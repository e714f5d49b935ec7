"""Windows of the training text, and bits per byte on the rest."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from examples.embedded_pair.corpus import SOURCES
from examples.embedded_pair.model import ByteMamba

# Austen counts double: the held-out text is hers, and it is the only prose.
WEIGHTS = {"austen": 2.0, "bible": 1.0, "shakespeare": 1.0}


def read(path: Path) -> Tensor:
    """The file's bytes, (size) uint8."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


class Corpus:
    """Training text by source, drawn in proportion to size and ``WEIGHTS``."""

    def __init__(self, folder: Path):
        self.texts = [read(folder / f"{source}.train.bin") for source in SOURCES]
        sizes = [len(text) * WEIGHTS[source] for text, source in zip(self.texts, SOURCES, strict=True)]
        self.chances = torch.tensor(sizes)

    def windows(self, rows: int, length: int) -> Tensor:
        """Random windows, (rows, length) int64."""
        drawn = []
        for source in torch.multinomial(self.chances, rows, replacement=True).tolist():
            text = self.texts[source]
            start = int(torch.randint(len(text) - length, ()))
            drawn.append(text[start : start + length])
        return torch.stack(drawn).long()


@torch.no_grad()
def bits_per_byte(model: ByteMamba, text: Tensor, length: int = 2048, limit: int = 1 << 30) -> float:
    """Mean bits per byte over windows of ``length`` bytes spread over ``text`` (size) uint8, ``limit`` bytes at most.

    Every window starts from an empty state and its first byte is not counted.
    """
    count = len(text) // length
    windows = text[: count * length].view(count, length)
    windows = windows[:: max(1, -(-count * length // limit))].long()
    total = 0.0
    for part in windows.split(8):
        predicted = model(part)[:, :-1].flatten(0, 1)
        total += float(functional.cross_entropy(predicted, part[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].numel() / math.log(2)
