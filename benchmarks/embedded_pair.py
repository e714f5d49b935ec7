"""Measures the embedded pair on text that neither model has seen: bits per byte, and acceptance of the draft.

python -m benchmarks.embedded_pair [--json FILE]

The text is the first part of Jane Austen's *Northanger Abbey*. Acceptance: the target continues passages of it with
K = 4, greedily and sampled, under both ways to test sampled drafts; accepted drafted tokens over drafted tokens that
were tested.
"""

import json
import math
from importlib import resources

import torch

import speculative_mamba as sm

from .report import parser, progress

CHUNK = 256
PASSAGES, PASSAGE_BYTES, NEW_BYTES, LOOKAHEAD = 24, 160, 128, 4
SAMPLING = {
    "greedy": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top-k 50, top-p 0.8": {"temperature": 0.8, "top_k": 50, "top_p": 0.8},
    "temperature 1, min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "greedy, repetition penalty 1.1": {"repetition_penalty": 1.1},
}


def bits_per_byte(model: sm.MambaLM, text: bytes) -> float:
    """Mean negative log2-likelihood of each byte after the first, all given everything before it."""
    ids = torch.tensor(list(text))
    cache = model.new_cache(1, CHUNK)
    start = torch.zeros(1, dtype=torch.int32)
    nats = 0.0
    for begin in range(0, len(ids) - 1, CHUNK):
        inputs = ids[begin : min(begin + CHUNK, len(ids) - 1)]
        logits = model.verify(inputs[None], cache, start)[0]
        next_tokens = ids[begin + 1 : begin + 1 + len(inputs)]
        nats -= torch.log_softmax(logits.double(), -1).gather(1, next_tokens[:, None]).sum().item()
        start[:] = len(inputs) - 1
    return nats / (len(ids) - 1) / math.log(2)


def acceptance(target: sm.MambaLM, draft: sm.MambaLM, text: bytes, sampling: sm.SamplingParams, how: str) -> dict:
    """Counts over passages of the text, each continued as a row of one batch."""
    step = len(text) // PASSAGES
    prompts = [list(text[begin : begin + PASSAGE_BYTES]) for begin in range(0, step * PASSAGES, step)]
    stats = sm.generate(
        target, prompts, draft=draft, lookahead=LOOKAHEAD, max_new_tokens=NEW_BYTES, sampling=sampling, acceptance=how
    ).stats
    return {
        "acceptance_rate": stats.acceptance_rate, "tested": stats.tested, "tokens_per_round": stats.tokens_per_round
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    target, draft = sm.load_model("builtin:target"), sm.load_model("builtin:draft")
    text = resources.files("speculative_mamba.models.builtin").joinpath("heldout.txt").read_bytes()
    rows = []
    print(f"{len(text)} bytes of unseen text")
    for name, model in (("target", target), ("draft", draft)):
        progress(f"bits per byte of the {name}")
        rows.append({"model": name, "bytes": model.weight_bytes, "bits_per_byte": bits_per_byte(model, text)})
        print(f"{name}: {rows[-1]['bits_per_byte']:.3f} bits per byte, {model.weight_bytes} bytes of weights")
    print(f"acceptance rate at K = {LOOKAHEAD}, {PASSAGES} passages of {NEW_BYTES} new bytes")
    for name, values in SAMPLING.items():
        sampling = sm.SamplingParams(**values)
        for how in ("rejection",) if sampling.greedy else ("rejection", "coupled"):
            progress(f"acceptance rate, {name}, {how}")
            row = {"sampling": name, "acceptance": how, **acceptance(target, draft, text, sampling, how)}
            rows.append(row)
            label = name if sampling.greedy else f"{name}, {how}"
            print(
                f"{label:>50}: {row['acceptance_rate']:.3f} of {row['tested']} tested, "
                f"{row['tokens_per_round']:.2f} tokens per round"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
