"""Measures the embedded pair on text that neither model has seen: bits per byte, and acceptance of the draft.

python -m benchmarks.embedded_pair [--json FILE]

The text is the first part of Jane Austen's *Northanger Abbey*. Acceptance: the target continues passages of it greedily
with K = 4; accepted drafted tokens over drafted tokens that were tested.
"""

import json
import math
from importlib import resources

import torch

import speculative_mamba as sm

from .report import parser

CHUNK = 256
PASSAGES, PASSAGE_BYTES, NEW_BYTES, LOOKAHEAD = 24, 160, 128, 4


def bits_per_byte(model: sm.MambaLM, text: bytes) -> float:
    """Mean negative log2-likelihood of each byte after the first, all given everything before it."""
    ids = torch.tensor(list(text))
    cache = model.new_cache(1, CHUNK)
    start = torch.zeros(1, dtype=torch.int32)
    nats = 0.0
    for begin in range(0, len(ids) - 1, CHUNK):
        inputs = ids[begin : min(begin + CHUNK, len(ids) - 1)]
        logits = model.verify(inputs[None], cache, start)[0]
        following = ids[begin + 1 : begin + 1 + len(inputs)]
        nats -= torch.log_softmax(logits.double(), -1).gather(1, following[:, None]).sum().item()
        start[:] = len(inputs) - 1
    return nats / (len(ids) - 1) / math.log(2)


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    target, draft = sm.load_model("builtin:target"), sm.load_model("builtin:draft")
    text = resources.files("speculative_mamba.models.builtin").joinpath("heldout.txt").read_bytes()
    row = {
        "target_bytes": target.weight_bytes,
        "draft_bytes": draft.weight_bytes,
        "target_bits_per_byte": bits_per_byte(target, text),
        "draft_bits_per_byte": bits_per_byte(draft, text),
    }
    accepted = tested = tokens = rounds = 0
    step = len(text) // PASSAGES
    for begin in range(0, step * PASSAGES, step):
        prompt = list(text[begin : begin + PASSAGE_BYTES])
        stats = sm.generate(target, [prompt], draft=draft, lookahead=LOOKAHEAD, max_new_tokens=NEW_BYTES).stats
        accepted, tested = accepted + stats.accepted, tested + stats.tested
        tokens, rounds = tokens + stats.tokens, rounds + stats.row_rounds
    row |= {"acceptance_rate": accepted / tested, "tested": tested, "tokens_per_round": tokens / rounds}
    print(f"{len(text)} bytes of unseen text")
    for name in ("target", "draft"):
        print(f"{name}: {row[f'{name}_bits_per_byte']:.3f} bits per byte, {row[f'{name}_bytes']} bytes of weights")
    print(
        f"acceptance rate, greedy, K={LOOKAHEAD}: {row['acceptance_rate']:.3f} of {tested} tested tokens, "
        f"{row['tokens_per_round']:.2f} tokens per round"
    )
    if options.json is not None:
        options.json.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
