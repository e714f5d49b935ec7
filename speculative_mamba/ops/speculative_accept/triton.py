"""All positions of all windows are decided at once, then each row's first rejection is looked up."""

import torch
import triton
import triton.language as tl

from ..noise import Purpose
from ..triton_candidates import candidates, with_strides
from ..triton_math import launch
from ..triton_noise import uniform
from ..triton_probs import (
    BLOCK,
    INFINITE,
    LATEST,
    REGISTERS,
    ROUNDING,
    WARPS,
    gumbel_argmax,
    kept,
    listed,
    logits_of,
    row_sampling,
    sort_key,
    threshold,
    weight_of,
)
from . import SpeculativeAcceptArgs

TEST = tl.constexpr(int(Purpose.TEST))
REGISTERS_WITH_PROBS = 160  # of a kernel that writes them as well
WINDOW = tl.constexpr(32)  # positions that are looked up together


@triton.jit
def _residual(token, p, draft_probs, row, drafted):
    """What the target has and the draft, of which a row of ``draft_probs`` is given, lacks: max(p - q, 0)."""
    certain = tl.where(token == drafted, 1.0, 0.0)
    q = certain if draft_probs is None else tl.load(draft_probs[0] + row + token, mask=p > 0, other=0.0)
    rest = tl.where(p > 0, p - q, 0.0)
    return tl.where(rest < 0, 0.0, rest)


@triton.jit(do_not_specialize=["tokens", "coupled", "purpose", "draft_stride"])
def _decide(
    logits, adjusted, penalties, bias, sampling, status, peaks, min_keys, totals, counts, ids, keys, weights,
    draft_tokens, draft_probs, rng_keys, positions, active, num_draft_tokens, is_stop, target_probs, choices, rejected,
    tokens, vocabulary, coupled, purpose, draft_stride,
):  # fmt: skip
    """Of a position of a window: whether its drafted token is rejected (the last has none), and what stands there then.

    Its status becomes that of the decision. Behind the last there is nothing to decide.
    """
    at = tl.program_id(0).to(tl.int64)
    b, t = at // tokens, at % tokens
    left_out = False if active is None else tl.load(active + b) == 0
    end = tokens - 1
    if num_draft_tokens is not None:
        end = tl.minimum(tl.maximum(tl.load(num_draft_tokens + b), 0), end)
    if left_out | (t > end):
        return
    found = tl.load(status + at)
    winner = 0
    rejects = True
    first = b * draft_stride + draft_stride - (tokens - 1)
    follows_stop = False
    if is_stop is not None:
        previous = tl.load(draft_tokens + first + t - 1, mask=t > 0, other=0)
        follows_stop = (t > 0) & (tl.load(is_stop + b * vocabulary + previous) != 0)
        found = tl.where(follows_stop, 0, found)
    if (found == 0) & (follows_stop == 0):
        temperature, top_k, nucleus, floor, greedy = row_sampling(sampling, b, vocabulary)
        row = logits_of(logits, adjusted, penalties, bias, at, tokens, vocabulary)
        peak = tl.load(peaks + at)
        ids, keys, weights = ids + at * vocabulary, keys + at * vocabulary, weights + at * vocabulary
        count = tl.load(counts + at)
        min_key, last, scale = threshold(
            ids, keys, weights, count, tl.load(min_keys + at), tl.load(totals + at), top_k, nucleus, floor
        )  # fmt: skip
        if target_probs is not None:
            for start in range(0, vocabulary, BLOCK):
                token = start + tl.arange(0, BLOCK)
                exists = token < vocabulary
                x = tl.load(row + token, mask=exists, other=-INFINITE)
                weight = kept(token, sort_key(x), weight_of(x, peak, temperature), min_key, last, floor)
                tl.store(target_probs[0] + b * target_probs[1] + token, weight * scale, mask=exists)
        seed, stream = tl.load(rng_keys + 2 * b), tl.load(rng_keys + 2 * b + 1)
        position = tl.load(positions + b) + t
        is_last = t == end
        chooses = is_last | (coupled != 0) | greedy
        drafted = tl.load(draft_tokens + first + t, mask=t < tokens - 1, other=0).to(tl.int32)
        q_row = t * 0
        if draft_probs is not None:
            q_row = b * draft_probs[1] + t * draft_probs[2]
        replaces = False  # by the residual
        if chooses == 0:
            x = tl.load(row + drafted)
            of_target = kept(drafted, sort_key(x), weight_of(x, peak, temperature), min_key, last, floor) * scale
            of_draft = tl.full((), 1.0, tl.float32)
            if draft_probs is not None:
                of_draft = tl.load(draft_probs[0] + q_row + drafted)
            if (of_draft > 0) & (of_draft < INFINITE):
                u = uniform(seed, stream, position, TEST)
                rejects = u * of_draft.to(tl.float64) >= of_target.to(tl.float64)
                if rejects:
                    sums = tl.zeros((BLOCK,), tl.float64)
                    for start in range(0, count, BLOCK):
                        token, p = listed(ids, keys, weights, start, count, min_key, last, floor)
                        sums += _residual(token, p * scale, draft_probs, q_row, drafted).to(tl.float64)
                    total = tl.sum(sums, 0)
                    replaces = (total > 0) & (total < INFINITE)
                    excess = of_draft.to(tl.float64) - of_target.to(tl.float64)
                    # Rounding alone can leave a refused token's excess uncovered.
                    if (replaces == 0) & ((total != 0) | (excess >= ROUNDING)):
                        found = 5
            else:
                found = 4
        if rejects & (found == 0):
            best = tl.full((), LATEST, tl.float64)
            for start in range(0, count, BLOCK):
                token, p = listed(ids, keys, weights, start, count, min_key, last, floor)
                p *= scale
                if replaces:
                    p = _residual(token, p, draft_probs, q_row, drafted)
                best, winner = gumbel_argmax(best, winner, token, p, seed, stream, position, purpose)
            rejects = is_last | (chooses == 0) | (winner != drafted)
    tl.store(status + at, found)
    tl.store(choices + at, winner)
    tl.store(rejected + at, rejects.to(tl.int8))


@triton.jit(do_not_specialize=["tokens"])
def _first_rejection(status, choices, rejected, active, accepted, next_token, row_status, tokens):
    b = tl.program_id(0).to(tl.int64)
    wanted = True if active is None else tl.load(active + b) != 0
    at = 0
    found = tl.where(wanted, -1, 0)
    while found < 0:
        position = at + tl.arange(0, WINDOW)
        rejects = tl.load(rejected + b * tokens + position, mask=position < tokens, other=1) != 0
        first = tl.min(tl.where(rejects, position, at + WINDOW), 0)
        found = tl.where(first < at + WINDOW, first, -1)
        at += WINDOW
    tl.store(accepted + b, found)
    tl.store(next_token + b, tl.load(choices + b * tokens + found, mask=wanted, other=0).to(tl.int64))
    tl.store(row_status + b, tl.load(status + b * tokens + found, mask=wanted, other=0))


def speculative_accept(args: SpeculativeAcceptArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = args.logits
    batch, tokens, _ = logits.shape
    draft_tokens = args.text_tokens
    lists = candidates(logits, args.sampling, args.prompt_mask, args.output_counts, draft_tokens)

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    choices, rejected = new(torch.int32, batch, tokens), new(torch.int8, batch, tokens)
    target_probs = None if args.target_probs is None else (args.target_probs, args.target_probs.stride(0))
    launch(
        _decide, batch * tokens, logits, WARPS, maxnreg=REGISTERS if target_probs is None else REGISTERS_WITH_PROBS,
        **lists.arguments(), draft_tokens=draft_tokens,
        draft_probs=None if args.draft_probs is None else with_strides(args.draft_probs), rng_keys=args.rng_keys,
        positions=args.positions, active=args.active, num_draft_tokens=args.num_draft_tokens,
        is_stop=args.is_stop, target_probs=target_probs, choices=choices, rejected=rejected, coupled=int(args.coupled),
        purpose=args.purpose, draft_stride=draft_tokens.shape[1],
    )  # fmt: skip
    accepted, next_token, row_status = new(torch.int32, batch), new(torch.int64, batch), new(torch.int32, batch)
    launch(
        _first_rejection, batch, logits, 1, status=lists.status, choices=choices, rejected=rejected,
        active=args.active, accepted=accepted, next_token=next_token, row_status=row_status, tokens=tokens,
    )  # fmt: skip
    return accepted, next_token, row_status
