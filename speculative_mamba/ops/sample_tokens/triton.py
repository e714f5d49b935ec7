"""A program draws a row's token from its shortlist, and writes the law of the whole vocabulary if that is wanted."""

import torch
import triton
import triton.language as tl

from ..triton_law import BLOCK, INFINITE, LATEST, REGISTERS, WARPS, enter_race, kept, key_of, law_of, listed, weight_of
from ..triton_math import launch
from ..triton_shortlist import shortlists
from . import SampleTokensArgs


@triton.jit(do_not_specialize=["top_k", "purpose"])
def _sample(
    logits, verdicts, peaks, leasts, totals, counts, ids, keys, weights, noise, positions, active, laws, tokens,
    vocabulary, temperature, top_k, nucleus, floor, purpose,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    wanted = True if active is None else tl.load(active + b) != 0
    verdict = tl.where(wanted, tl.load(verdicts + b), 0)
    winner = 0
    if wanted & (verdict == 0):
        ids, keys, weights = ids + b * vocabulary, keys + b * vocabulary, weights + b * vocabulary
        count = tl.load(counts + b)
        least, last, scale = law_of(
            ids, keys, weights, count, tl.load(leasts + b), tl.load(totals + b), top_k, nucleus, floor
        )  # fmt: skip
        seed, stream, position = tl.load(noise + 2 * b), tl.load(noise + 2 * b + 1), tl.load(positions + b)
        best = tl.full((), LATEST, tl.float64)
        for start in range(0, count, BLOCK):
            token, weight = listed(ids, keys, weights, start, count, least, last, floor)
            best, winner = enter_race(best, winner, token, weight * scale, seed, stream, position, purpose)
        if laws is not None:
            peak = tl.load(peaks + b)
            for start in range(0, vocabulary, BLOCK):
                token = start + tl.arange(0, BLOCK)
                exists = token < vocabulary
                x = tl.load(logits[0] + b * logits[1] + token, mask=exists, other=-INFINITE)
                weight = kept(token, key_of(x), weight_of(x, peak, temperature), least, last, floor)
                tl.store(laws[0] + b * laws[1] + token, weight * scale, mask=exists)
    tl.store(tokens + b, winner.to(tl.int64))
    tl.store(verdicts + b, verdict)


def sample_tokens(args: SampleTokensArgs) -> tuple[torch.Tensor, torch.Tensor]:
    logits, laws = args.logits, args.laws
    lists = shortlists(logits[:, None], args.filters, args.seen, args.recent, args.recent.shape[1])
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    launch(
        _sample, len(logits), logits, WARPS, maxnreg=REGISTERS, **lists.arguments(), noise=args.keys,
        positions=args.positions, active=args.active, laws=None if laws is None else (laws, laws.stride(0)),
        tokens=tokens, purpose=args.purpose,
    )  # fmt: skip
    return tokens, lists.verdicts[:, 0]
