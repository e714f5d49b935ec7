"""A program commits a row's tokens, all at once."""

import torch
import triton
import triton.language as tl

from ..triton_math import launch
from . import CommitTokensArgs, FinishReason, Record

_EOS, _LENGTH = tl.constexpr(int(FinishReason.EOS)), tl.constexpr(int(FinishReason.LENGTH))
_NUM_COMMITTED, _ACCEPTED = tl.constexpr(int(Record.NUM_COMMITTED)), tl.constexpr(int(Record.ACCEPTED))
_ROW_STATUS, _DRAFT_STATUS = tl.constexpr(int(Record.ROW_STATUS)), tl.constexpr(int(Record.DRAFT_STATUS))
_NUM_DRAFT_TOKENS = tl.constexpr(int(Record.NUM_DRAFT_TOKENS))
_FINISH_REASON, _TOKENS = tl.constexpr(int(Record.FINISH_REASON)), tl.constexpr(int(Record.TOKENS))


@triton.jit(do_not_specialize=["batch", "lookahead", "vocabulary", "steps", "capacity"])
def _commit(
    draft_tokens, accepted, next_token, row_status, draft_status, num_draft_tokens, is_stop, last, positions, remaining,
    active, slots, output_counts, text, record, batch, lookahead, vocabulary, steps, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    was_active = tl.load(active + b) != 0
    drafted = tl.where(was_active, lookahead, 0)
    if num_draft_tokens is not None:
        drafted = tl.minimum(drafted, tl.where(was_active, tl.load(num_draft_tokens + b), 0))
    token = tl.load(draft_tokens + b * lookahead + at, mask=at < lookahead, other=0)
    stops = is_stop + b * vocabulary
    broken_draft = 0
    if draft_status is not None:
        ends = tl.load(stops + token, mask=at < drafted, other=0) != 0
        counted = tl.min(tl.where(ends, at + 1, drafted), 0)
        broken_draft = tl.max(tl.load(draft_status + at.to(tl.int64) * batch + b, mask=at < counted, other=0), 0)
    stands = tl.where(was_active, tl.load(accepted + b), 0)
    status = tl.where(was_active, tl.load(row_status + b), 0)
    budget = tl.load(remaining + b)
    window = tl.where(was_active, stands + 1, 0)
    commits = was_active & (status == 0) & (broken_draft == 0)
    limit = tl.where(commits, tl.minimum(window, budget), 0)
    token = tl.where(at < stands, token, 0)
    token = tl.where(at == window - 1, tl.load(next_token + b), token)
    ends = tl.load(stops + token, mask=at < limit, other=0) != 0
    first_stop = tl.min(tl.where(ends, at, limit), 0)
    count = tl.minimum(first_stop + 1, limit)
    reason = tl.where(first_stop < limit, _EOS, tl.where(commits & (count == budget), _LENGTH, 0))
    goes_on = commits & (reason == 0)
    columns = record + b * (_TOKENS + lookahead + 1)
    tl.store(columns + _NUM_COMMITTED, count.to(tl.int64))
    tl.store(columns + _ACCEPTED, stands.to(tl.int64))
    tl.store(columns + _ROW_STATUS, status.to(tl.int64))
    tl.store(columns + _DRAFT_STATUS, broken_draft)
    tl.store(columns + _NUM_DRAFT_TOKENS, drafted.to(tl.int64))
    tl.store(columns + _FINISH_REASON, reason.to(tl.int64))
    tl.store(columns + _TOKENS + at, token, mask=at <= lookahead)
    tl.store(slots + at.to(tl.int64) * batch + b, tl.where(goes_on, tl.where(at == 0, count - 1, at), -1), at < steps)
    tl.store(active + b, goes_on)
    if count > 0:
        latest = tl.load(last + 2 * b + 1)
        tl.store(last + 2 * b, tl.where(count > 1, tl.sum(tl.where(at == count - 2, token, 0), 0), latest))
        tl.store(last + 2 * b + 1, tl.sum(tl.where(at == count - 1, token, 0), 0))
        position = tl.load(positions + b)
        tl.store(positions + b, position + count)
        tl.store(remaining + b, budget - count)
        if output_counts is not None:
            tl.atomic_add(output_counts + b * vocabulary + token, 1, mask=at < count)
        if text is not None:
            tl.store(text + b * capacity + position + at, token, mask=(at < count) & (position + at < capacity))


def commit_tokens(args: CommitTokensArgs) -> torch.Tensor:
    state, text = args.state, args.text
    (batch, lookahead), steps = args.draft_tokens.shape, len(state.slots)
    record = args.draft_tokens.new_empty(batch, Record.TOKENS + lookahead + 1)
    launch(
        _commit, batch, args.draft_tokens, 1, draft_tokens=args.draft_tokens, accepted=args.accepted,
        next_token=args.next_token, row_status=args.row_status, draft_status=args.draft_status,
        num_draft_tokens=args.num_draft_tokens, is_stop=args.is_stop, **vars(state), output_counts=args.output_counts,
        text=text, record=record, batch=batch, lookahead=lookahead, vocabulary=args.is_stop.shape[1], steps=steps,
        capacity=0 if text is None else text.shape[1], BLOCK=triton.next_power_of_2(steps),
    )  # fmt: skip
    return record
