"""One launch writes the window's keys and values, the next attends, the last writes the lengths.

A program attends with a tile of queries of one kv head. Blocks of entries start at fixed positions. A block that all
tokens of the tile see in full is taken by all of them at once; one that ends among them by one token after the other,
so that a query meets its own entries only. Either way a query's sums are made by the same instructions.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import exp, lane_sums, launch, narrow, row_sums, widen
from ..triton_rotary import rotated
from . import AttentionVerifyArgs

QUERIES = 16  # in a tile
ENTRIES = 32  # in a block; half as many where each is larger
PART = 16  # dimensions that are multiplied at a time
VARIES = ["tokens", "write_slot", "final_state_only"]


@triton.jit
def _window(lengths, start_slot, left_padding, b, tokens, slots):
    """Entries before the window, and its left padding: all of them in a row that is left out."""
    slot = tl.load(start_slot + b)
    start = tl.load(lengths + b * slots + slot, mask=slot >= 0, other=0)
    padding = tokens * 0
    if left_padding is not None:
        padding = tl.minimum(tl.maximum(tl.load(left_padding + b), 0), tokens)
    return start, tl.where(slot >= 0, padding, tokens)


@triton.jit(do_not_specialize=VARIES)
def _write(
    k, v, keys, values, lengths, start_slot, left_padding, inv_freq, tokens, kv_heads, dims, slots, pairs,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """k, v, keys, values are (pointer, batch stride, token or head stride). A program writes a tile of heads."""
    tiles = tl.cdiv(tokens * kv_heads, QUERIES)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    t, head = i // kv_heads, i % kv_heads
    d = tl.arange(0, BLOCK)[None, :]
    start, padding = _window(lengths, start_slot, left_padding, b, tokens, slots)
    exists = ((t >= padding) & (t < tokens))[:, None] & (d < dims)
    position = start + t - padding
    key = rotated(k[0] + b * k[1] + t.to(tl.int64) * k[2] + head * dims, exists, position, inv_freq, pairs, BLOCK)
    value = tl.load(v[0] + b * v[1] + (t.to(tl.int64) * v[2] + head * dims)[:, None] + d, mask=exists)
    entry = position.to(tl.int64) * dims
    at = keys[0] + b * keys[1] + (head.to(tl.int64) * keys[2] + entry)[:, None] + d
    tl.store(at, narrow(key, keys[0].dtype.element_ty), mask=exists)
    at = values[0] + b * values[1] + (head.to(tl.int64) * values[2] + entry)[:, None] + d
    tl.store(at, narrow(widen(value), values[0].dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=VARIES)
def _attend(
    q, keys, values, lengths, start_slot, left_padding, inv_freq, y, tokens, heads, kv_heads, dims, slots, pairs, scale,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = BLOCK // PARTS
    group = heads // kv_heads
    tiles = tl.cdiv(tokens * group, QUERIES)
    b = (tl.program_id(0) // (tiles * kv_heads)).to(tl.int64)
    kv_head = tl.program_id(0) // tiles % kv_heads
    i = tl.program_id(0) % tiles * QUERIES
    t, head = (i + tl.arange(0, QUERIES)) // group, kv_head * group + (i + tl.arange(0, QUERIES)) % group
    start, padding = _window(lengths, start_slot, left_padding, b, tokens, slots)
    begin = start - padding  # token t is at position begin + t
    first, last = tl.maximum(i // group, padding), tl.minimum(tl.cdiv(i + QUERIES, group), tokens)  # tokens of the tile
    attends = (t >= padding) & (t < tokens)

    d = tl.arange(0, BLOCK)
    at = q[0] + b * q[1] + t.to(tl.int64) * q[2] + head * dims
    query = rotated(at, attends[:, None] & (d < dims)[None, :], begin + t, inv_freq, pairs, BLOCK) * scale
    # Dimensions are multiplied in parts, as one multiplication of all would need too many registers.
    query = tl.permute(tl.reshape(query, (QUERIES, PARTS, PART)), (1, 0, 2))
    d = tl.reshape(d, (PARTS, PART))[:, None, :]
    keys = keys[0] + b * keys[1] + kv_head.to(tl.int64) * keys[2] + d
    values = values[0] + b * values[1] + kv_head.to(tl.int64) * values[2] + d
    running_max = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((PARTS, QUERIES, PART), tl.float32)
    for block in range(0, tl.where(first < last, begin + last, 0), ENTRIES):
        visible = block + ENTRIES <= begin + first + 1
        for token in range(first, tl.where(visible, first + 1, last)):
            entry = block + tl.arange(0, ENTRIES)
            seen = entry <= begin + token
            place = entry.to(tl.int64)[None, :, None] * dims
            there = seen[None, :, None] & (d < dims)
            key = widen(tl.load(keys + place, mask=there, other=0.0))
            value = widen(tl.load(values + place, mask=there, other=0.0))
            scores = lane_sums(tl.dot(query, tl.permute(key, (0, 2, 1)), input_precision="ieee"))
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_max = tl.maximum(running_max, tl.max(scores, 1))
            weights = exp(scores - new_max[:, None])
            rescale = exp(running_max - new_max)
            added = tl.dot(tl.broadcast_to(weights[None], (PARTS, QUERIES, ENTRIES)), value, input_precision="ieee")
            turn = attends & (visible | (t == token))
            total = tl.where(turn, tl.fma(total, rescale, row_sums(weights)), total)
            sums = tl.where(turn[None, :, None], tl.fma(sums, rescale[None, :, None], added), sums)
            running_max = tl.where(turn, new_max, running_max)
    total = tl.where(attends, total, 1.0)[None, :, None]
    at = y + ((b * tokens + t) * heads + head)[None, :, None] * dims + d
    tl.store(at, narrow(tl.div_rn(sums, total), y.dtype.element_ty), mask=(t < tokens)[None, :, None] & (d < dims))


@triton.jit(do_not_specialize=VARIES)
def _advance(lengths, start_slot, left_padding, tokens, slots, write_slot, final_state_only):
    """A program reads its row's length before it writes any."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(start_slot + b) < 0:
        return
    start, padding = _window(lengths, start_slot, left_padding, b, tokens, slots)
    if final_state_only != 0:
        tl.store(lengths + b * slots, start + tokens - padding)
    else:
        for t in range(0, tokens):
            tl.store(lengths + b * slots + write_slot + t, start + tl.maximum(t + 1 - padding, 0))


def attention_verify(args: AttentionVerifyArgs) -> torch.Tensor:
    batch, tokens, heads, dims = args.q.shape
    kv_heads, inv_freq, lengths = args.k.shape[2], args.inv_freq, args.lengths
    window = {"lengths": lengths, "start_slot": args.start_slot, "left_padding": args.left_padding, "tokens": tokens,
              "slots": lengths.shape[1]}  # fmt: skip
    block = max(PART, triton.next_power_of_2(dims))
    sizes = {"inv_freq": inv_freq, "pairs": 0 if inv_freq is None else len(inv_freq), "kv_heads": kv_heads,
             "dims": dims, "QUERIES": QUERIES, "BLOCK": block}  # fmt: skip
    strided = (args.q, args.k, args.v, args.keys, args.values)
    q, k, v, keys, values = ((tensor, tensor.stride(0), tensor.stride(1)) for tensor in strided)
    y = torch.empty(batch, tokens, heads, dims, dtype=args.q.dtype, device=args.q.device)
    launch(
        _write, batch * triton.cdiv(tokens * kv_heads, QUERIES), lengths, 4, k=k, v=v, keys=keys, values=values,
        **window, **sizes,
    )  # fmt: skip
    launch(
        _attend, batch * kv_heads * triton.cdiv(tokens * heads // kv_heads, QUERIES), lengths,
        8, q=q, keys=keys, values=values, y=y, heads=heads, scale=args.scale, PARTS=block // PART,
        ENTRIES=ENTRIES if block <= 128 else ENTRIES // 2, **window, **sizes,
    )  # fmt: skip
    launch(
        _advance, batch, lengths, 1, **window, write_slot=args.write_slot, final_state_only=int(args.final_state_only)
    )
    return y
