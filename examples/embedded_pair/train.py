"""Trains the target on text, or the draft on text and on the target's predictions. CPU, float32.

    python -m examples.embedded_pair.train target --minutes 64 --text TEXT --out OUT/target
    python -m examples.embedded_pair.train draft --minutes 11 --text TEXT --out OUT/draft --teacher OUT/target

TEXT is the folder written by ``examples.embedded_pair.corpus``. The learning rate follows the time spent, not the
number of steps.
A run that was stopped goes on from its last checkpoint, OUT/.../last.pt; a finished one leaves final.pt.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.embedded_pair import model as models
from examples.embedded_pair.data import Corpus, bits_per_byte, read
from examples.embedded_pair.distill import Pool, acceptance
from examples.embedded_pair.muon import Muon

SETTINGS = {  # learning rates of matrices and of the rest, rows and length of a batch
    "target": {"matrix_rate": 6e-3, "rate": 3e-3, "rows": 8, "length": 512},
    "draft": {"matrix_rate": 8e-3, "rate": 4e-3, "rows": 16, "length": 384},
}
FINAL_RATE = 0.02
WARMUP_STEPS = 100
LOG_EVERY = 60.0
CHECKPOINT_EVERY = 300.0


class Optimizer:
    """Muon for the large projections inside the blocks, AdamW for everything else."""

    def __init__(self, model: nn.Module, matrix_rate: float, rate: float):
        inside = [p for name, p in model.named_parameters() if name.endswith(("in_proj.weight", "out_proj.weight"))]
        names = {id(p) for p in inside}
        others = [p for p in model.parameters() if id(p) not in names]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.parts = [Muon(inside, matrix_rate), torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)]
        self.rates = (matrix_rate, rate)
        self.parameters = list(model.parameters())

    def step(self, factor: float) -> None:
        """One step with both learning rates multiplied by ``factor``; clears the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def rate_factor(progress: float, steps: int) -> float:
    """Warm-up by steps, then a cosine over ``progress`` from 0 to 1 down to ``FINAL_RATE``."""
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return cosine * min(1.0, (steps + 1) / WARMUP_STEPS)


def train(
    name: str, out: Path, minutes: float, loss_of: Callable[[models.ByteMamba, float], Tensor], held_out: Tensor
) -> models.ByteMamba:
    """Minimises ``loss_of(model, progress)`` for ``minutes``; progress runs from 0 to 1."""
    out.mkdir(parents=True, exist_ok=True)
    model = models.ByteMamba(models.SIZES[name])
    optimizer = Optimizer(model, SETTINGS[name]["matrix_rate"], SETTINGS[name]["rate"])
    last, steps, spent = out / "last.pt", 0, 0.0
    if last.exists():
        model, record = models.load(last)
        optimizer = Optimizer(model, SETTINGS[name]["matrix_rate"], SETTINGS[name]["rate"])
        optimizer.load_state_dict(record["optimizer"])
        steps, spent = record["steps"], record["spent"]
        torch.manual_seed(steps)
    started = time.monotonic() - spent
    logged, kept, losses = spent, spent, []
    while spent < 60 * minutes:
        progress = spent / (60 * minutes)
        loss = loss_of(model, progress)
        loss.backward()
        optimizer.step(rate_factor(progress, steps))
        losses.append(loss.item() / math.log(2))
        steps, spent = steps + 1, time.monotonic() - started
        if spent - logged > LOG_EVERY:
            bits = bits_per_byte(model, held_out, limit=1 << 16)
            mean = sum(losses) / len(losses)
            print(f"{name}: {spent / 60:.1f} of {minutes:.1f} minutes, step {steps}, loss {mean:.3f} bits", end=", ")
            print(f"held-out novel {bits:.3f} bits per byte", flush=True)
            logged, losses = spent, []
        if spent - kept > CHECKPOINT_EVERY:
            models.save(model, last, optimizer=optimizer.state_dict(), steps=steps, spent=spent)
            kept = spent
    models.save(model, out / "final.pt", steps=steps, spent=spent)
    return model


def train_target(corpus: Corpus, out: Path, minutes: float, held_out: Tensor) -> models.ByteMamba:
    rows, length = SETTINGS["target"]["rows"], SETTINGS["target"]["length"]

    def loss_of(model: models.ByteMamba, progress: float) -> Tensor:
        longer = 2 if progress > 0.8 else 1
        text = corpus.windows(rows // longer, length * longer + 1)
        return functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return train("target", out, minutes, loss_of, held_out)


def train_draft(
    corpus: Corpus, teacher: models.ByteMamba, out: Path, minutes: float, held_out: Tensor
) -> models.ByteMamba:
    """A third of the time makes the pool of the teacher's predictions, the rest trains on pool and plain text."""
    rows, length = SETTINGS["draft"]["rows"], SETTINGS["draft"]["length"]
    began = time.monotonic()
    pool = Pool(corpus, teacher, length, seconds=20 * minutes)
    print(f"pool: {len(pool)} windows in {time.monotonic() - began:.0f} s", flush=True)

    def loss_of(model: models.ByteMamba, progress: float) -> Tensor:
        plain = rows // 4 if progress < 0.8 else 0
        text, logits = pool.draw(rows - plain)
        predicted = model(text[:, :-1]).flatten(0, 1)
        soft = torch.softmax(logits.float(), -1).flatten(0, 1)
        loss = functional.cross_entropy(predicted, soft)
        if plain:
            text = corpus.windows(plain, length)
            loss = loss + 0.25 * functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        return loss

    return train("draft", out, minutes - (time.monotonic() - began) / 60, loss_of, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=models.SIZES)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="folder of the trained target, for the draft")
    options = parser.parse_args()
    torch.manual_seed(0)
    corpus, held_out = Corpus(options.text), read(options.text / "heldout.bin")
    if options.name == "target":
        model = train_target(corpus, options.out, options.minutes, held_out)
    else:
        teacher, _ = models.load(options.teacher / "final.pt")
        model = train_draft(corpus, teacher, options.out, options.minutes, held_out)
        print(f"acceptance {acceptance(teacher, model, held_out):.3f}")
    print(f"{options.name}: held-out novel {bits_per_byte(model, held_out):.3f} bits per byte")


if __name__ == "__main__":
    main()
