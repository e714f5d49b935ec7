"""What the draft learns from, the target's predictions on corpus text and its own; how often the draft is right."""

import time

import torch
from torch import Tensor

from examples.embedded_pair.data import Corpus
from examples.embedded_pair.model import ByteMamba

PROMPT = 128
BATCH = 128
AHEAD = 4


class Pool:
    """Windows with the teacher's logits: text (windows, length) uint8, logits (windows, length - 1, 256) bfloat16.

    Half of the time goes into text that the teacher continues from a corpus prompt of 128 bytes, two batches greedily
    for each one sampled at temperature 0.8; the other half into corpus text as it stands.
    """

    def __init__(self, corpus: Corpus, teacher: ByteMamba, length: int, seconds: float):
        texts, logits = [], []
        began, batch = time.monotonic(), 0
        while (spent := time.monotonic() - began) < seconds:
            if spent < seconds / 2:
                temperature = 0.8 if batch % 3 == 2 else 0.0
                text, predicted = teacher.generate(corpus.windows(BATCH, PROMPT), length - PROMPT, temperature)
            else:
                text = corpus.windows(8, length)
                with torch.no_grad():
                    predicted = teacher(text[:, :-1])
            texts.append(text.to(torch.uint8))
            logits.append(predicted.bfloat16())
            batch += 1
        self.text, self.logits = torch.cat(texts), torch.cat(logits)

    def __len__(self) -> int:
        return len(self.text)

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Random windows: text (rows, length) int64, logits (rows, length - 1, 256) bfloat16."""
        picked = torch.randint(len(self.text), (rows,))
        return self.text[picked].long(), self.logits[picked]


@torch.no_grad()
def acceptance(
    target: ByteMamba, draft: ByteMamba, text: Tensor, prompts: int = 20, length: int = 160, count: int = 128
) -> float:
    """Accepted share of the draft's tested bytes on the target's greedy continuations of ``text`` (size) uint8.

    At every position of a continuation the draft proposes 4 bytes; those up to the first that differs from the
    target's are accepted, that first one is tested too, the rest are not.
    """
    starts = torch.arange(prompts) * ((len(text) - length) // prompts)
    prompt = torch.stack([text[start : start + length] for start in starts.tolist()]).long()
    continued, _ = target.generate(prompt, count + AHEAD)
    caches = draft.new_caches(prompts)
    logits = draft(prompt, caches)[:, -1]
    accepted = tested = 0
    for position in range(length, length + count):
        trial, guess = [cache.copy() for cache in caches], logits.argmax(-1)
        going = torch.ones(prompts, dtype=torch.bool)
        for step in range(AHEAD):
            tested += int(going.sum())
            going &= guess == continued[:, position + step]
            accepted += int(going.sum())
            guess = draft(guess[:, None], trial)[:, -1].argmax(-1)
        logits = draft(continued[:, position, None], caches)[:, -1]
    return accepted / tested
