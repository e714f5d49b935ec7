"""A program commits a row's tokens, all at once."""

import torch
import triton
import triton.language as tl

from ..triton_math import launch
from . import CommitTokensArgs
from .rows import RECORD_COLUMNS


@triton.jit(do_not_specialize=["batch", "lookahead", "vocabulary", "steps", "capacity", "columns"])
def _commit(
    drafted, accepted, following, verdicts, limits, is_stop, last, positions, room, active, slots, output_counts, text,
    record, batch, lookahead, vocabulary, steps, capacity, columns, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    was_active = tl.load(active + b) != 0
    stands = tl.where(was_active, tl.load(accepted + b), 0)
    verdict = tl.where(was_active, tl.load(verdicts + b), 0)
    space = tl.load(room + b)
    window = tl.where(was_active, stands + 1, 0)
    limit = tl.where(was_active & (verdict == 0), tl.minimum(stands, space) + 1, 0)
    token = tl.load(drafted + b * lookahead + at, mask=at < stands, other=0)
    token = tl.where(at == window - 1, tl.load(following + b), token)
    ends = tl.load(is_stop + token, mask=at < limit, other=0) != 0
    first_stop = tl.min(tl.where(ends, at, limit), 0)
    count = tl.minimum(first_stop + 1, limit)
    goes_on = (count > 0) & (first_stop == limit) & (space >= count)
    begin = record + b * columns
    tl.store(begin, count.to(tl.int64))
    tl.store(begin + 1, stands.to(tl.int64))
    tl.store(begin + 2, verdict.to(tl.int64))
    counted = tl.where(was_active, tl.minimum(tl.load(limits + b), lookahead), 0)
    tl.store(begin + 3, counted.to(tl.int64))
    tl.store(begin + 4 + at, token, mask=at <= lookahead)
    tl.store(slots + at.to(tl.int64) * batch + b, tl.where(goes_on, tl.where(at == 0, count - 1, at), -1), at < steps)
    tl.store(active + b, goes_on)
    if count > 0:
        latest = tl.load(last + 2 * b + 1)
        tl.store(last + 2 * b, tl.where(count > 1, tl.sum(tl.where(at == count - 2, token, 0), 0), latest))
        tl.store(last + 2 * b + 1, tl.sum(tl.where(at == count - 1, token, 0), 0))
        position = tl.load(positions + b)
        tl.store(positions + b, position + count)
        tl.store(room + b, space - count)
        if output_counts is not None:
            tl.atomic_add(output_counts + b * vocabulary + token, 1, mask=at < count)
        if text is not None:
            tl.store(text + b * capacity + position + at, token, mask=(at < count) & (position + at < capacity))


def commit_tokens(args: CommitTokensArgs) -> torch.Tensor:
    drafted, rows, text = args.drafted, args.rows, args.text
    (batch, lookahead), steps = drafted.shape, len(rows.slots)
    record = drafted.new_empty(batch, lookahead + RECORD_COLUMNS)
    launch(
        _commit, batch, drafted, 1, drafted=drafted, accepted=args.accepted, following=args.following,
        verdicts=args.verdicts, limits=args.limits, is_stop=args.is_stop, **vars(rows),
        output_counts=args.output_counts, text=text, record=record, batch=batch, lookahead=lookahead,
        vocabulary=len(args.is_stop), steps=steps, capacity=0 if text is None else text.shape[1],
        columns=record.shape[1], BLOCK=triton.next_power_of_2(steps),
    )  # fmt: skip
    return record
