"""All positions of all windows are decided at once, then each row's first refused one is looked up."""

import torch
import triton
import triton.language as tl

from ..law import ROUNDING as _ROUNDING
from ..noise import Purpose
from ..triton_law import BLOCK, INFINITE, LATEST, REGISTERS, WARPS, enter_race, kept, key_of, law_of, listed, weight_of
from ..triton_math import launch
from ..triton_noise import uniform
from ..triton_shortlist import shortlists, with_strides
from . import SpeculativeAcceptArgs

ROUNDING = tl.constexpr(_ROUNDING)
TOKEN, TEST = tl.constexpr(int(Purpose.TOKEN)), tl.constexpr(int(Purpose.TEST))
WINDOW = tl.constexpr(32)  # positions that are looked up together


@triton.jit
def _residual(token, p, laws, row, drafted):
    """What the target has and the draft, of which a row of ``laws`` is given, lacks: max(p - q, 0)."""
    certain = tl.where(token == drafted, 1.0, 0.0)
    q = certain if laws is None else tl.load(laws[0] + row + token, mask=p > 0, other=0.0)
    rest = tl.where(p > 0, p - q, 0.0)
    return tl.where(rest < 0, 0.0, rest)


@triton.jit(do_not_specialize=["tokens", "coupled", "top_k"])
def _decide(
    logits, verdicts, peaks, leasts, totals, counts, ids, keys, weights, drafted, laws, noise, positions, limits,
    choices, refused, tokens, vocabulary, temperature, top_k, nucleus, floor, coupled,
):  # fmt: skip
    """Of a position of a window: whether its drafted token is refused (the last has none), and what stands there then.

    Its verdict becomes that of the decision. Behind the last there is nothing to decide.
    """
    at = tl.program_id(0).to(tl.int64)
    b, t = at // tokens, at % tokens
    end = tokens - 1
    if limits is not None:
        end = tl.minimum(tl.maximum(tl.load(limits + b), 0), end)
    if t > end:
        return
    verdict = tl.load(verdicts + at)
    winner = 0
    refuses = True
    if verdict == 0:
        ids, keys, weights = ids + at * vocabulary, keys + at * vocabulary, weights + at * vocabulary
        count = tl.load(counts + at)
        least, last, scale = law_of(
            ids, keys, weights, count, tl.load(leasts + at), tl.load(totals + at), top_k, nucleus, floor
        )  # fmt: skip
        seed, stream, position = tl.load(noise + 2 * b), tl.load(noise + 2 * b + 1), tl.load(positions + b) + t
        is_last = t == end
        chooses = is_last | (coupled != 0)
        theirs = tl.load(drafted + b * (tokens - 1) + t, mask=t < tokens - 1, other=0).to(tl.int32)
        law_row = t * 0
        if laws is not None:
            law_row = b * laws[1] + t * laws[2]
        rejects = False
        if chooses == 0:
            x = tl.load(logits[0] + b * logits[1] + t * logits[2] + theirs)
            weight = weight_of(x, tl.load(peaks + at), temperature)
            of_target = kept(theirs, key_of(x), weight, least, last, floor) * scale
            of_draft = tl.full((), 1.0, tl.float32)
            if laws is not None:
                of_draft = tl.load(laws[0] + law_row + theirs)
            if (of_draft > 0) & (of_draft < INFINITE):
                u = uniform(seed, stream, position, TEST)
                refuses = u * of_draft.to(tl.float64) >= of_target.to(tl.float64)
                if refuses:
                    sums = tl.zeros((BLOCK,), tl.float64)
                    for start in range(0, count, BLOCK):
                        token, p = listed(ids, keys, weights, start, count, least, last, floor)
                        sums += _residual(token, p * scale, laws, law_row, theirs).to(tl.float64)
                    total = tl.sum(sums, 0)
                    rejects = (total > 0) & (total < INFINITE)
                    excess = of_draft.to(tl.float64) - of_target.to(tl.float64)
                    # The laws' own rounding can leave a refused token's excess uncovered.
                    if (rejects == 0) & ((total != 0) | (excess >= ROUNDING)):
                        verdict = 5
            else:
                verdict = 4
        if refuses & (verdict == 0):
            best = tl.full((), LATEST, tl.float64)
            for start in range(0, count, BLOCK):
                token, p = listed(ids, keys, weights, start, count, least, last, floor)
                p *= scale
                if rejects:
                    p = _residual(token, p, laws, law_row, theirs)
                best, winner = enter_race(best, winner, token, p, seed, stream, position, TOKEN)
            refuses = is_last | (chooses == 0) | (winner != theirs)
    tl.store(verdicts + at, verdict)
    tl.store(choices + at, winner)
    tl.store(refused + at, refuses.to(tl.int8))


@triton.jit(do_not_specialize=["tokens"])
def _first_refused(verdicts, choices, refused, active, accepted, following, row_verdicts, tokens):
    b = tl.program_id(0).to(tl.int64)
    at = 0
    found = -1
    while found < 0:
        position = at + tl.arange(0, WINDOW)
        refuses = tl.load(refused + b * tokens + position, mask=position < tokens, other=1) != 0
        first = tl.min(tl.where(refuses, position, at + WINDOW), 0)
        found = tl.where(first < at + WINDOW, first, -1)
        at += WINDOW
    wanted = True if active is None else tl.load(active + b) != 0
    tl.store(accepted + b, tl.where(wanted, found, 0))
    tl.store(following + b, tl.where(wanted, tl.load(choices + b * tokens + found), 0).to(tl.int64))
    tl.store(row_verdicts + b, tl.where(wanted, tl.load(verdicts + b * tokens + found), 0))


def speculative_accept(args: SpeculativeAcceptArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, _ = args.logits.shape
    lists = shortlists(args.logits, args.filters, args.seen, args.drafted, 0)

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=args.logits.device)

    choices, refused = new(torch.int32, batch, tokens), new(torch.int8, batch, tokens)
    launch(
        _decide, batch * tokens, args.logits, WARPS, maxnreg=REGISTERS, **lists.arguments(), drafted=args.drafted,
        laws=None if args.laws is None else with_strides(args.laws), noise=args.keys, positions=args.positions,
        limits=args.limits, choices=choices, refused=refused, tokens=tokens,
        coupled=int(args.coupled or args.filters.greedy),
    )  # fmt: skip
    accepted, following, verdicts = new(torch.int32, batch), new(torch.int64, batch), new(torch.int32, batch)
    launch(
        _first_refused, batch, args.logits, 1, verdicts=lists.verdicts, choices=choices, refused=refused,
        active=args.active, accepted=accepted, following=following, row_verdicts=verdicts, tokens=tokens,
    )  # fmt: skip
    return accepted, following, verdicts
