"""The specification in PyTorch, in the dtype of q: float32, in which 16 bits are computed too, or float64 to
measure the kernels' error. Keys and values are rounded to the dtype of the cache.

Token by token and without matrix products, because PyTorch rounds sums by the shapes of their tensors.
"""

import torch

from ..wide import is_narrow, widened
from . import AttentionVerifyArgs


def attention_verify(args: AttentionVerifyArgs) -> torch.Tensor:
    q = args.q
    if is_narrow(q):
        return attention_verify(widened(args, "q", "k", "v")).to(q.dtype)
    batch, tokens, heads, _ = q.shape
    kv_heads = args.k.shape[2]
    y = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b in range(batch):
        if args.start_slot[b] < 0:
            continue
        length = int(args.lengths[b, args.start_slot[b]])
        for t in range(tokens):
            if args.left_padding is None or t >= args.left_padding[b]:
                args.keys[b, :, length] = rotate(args.k[b, t], length, args.inv_freq)
                args.values[b, :, length] = args.v[b, t]
                query = rotate(q[b, t], length, args.inv_freq) * args.scale
                query = query.unflatten(0, (kv_heads, heads // kv_heads))
                length += 1
                keys, values = (c[b, :, :length].to(q.dtype).contiguous()[:, None] for c in (args.keys, args.values))
                weights = torch.softmax((query[:, :, None] * keys).sum(-1), -1)
                y[b, t] = (weights[..., None] * values).sum(-2).flatten(0, 1)
            if not args.final_state_only:
                args.lengths[b, args.write_slot + t] = length
        if args.final_state_only:
            args.lengths[b, 0] = length
    return y


def rotate(x: torch.Tensor, position: int, inv_freq: torch.Tensor | None) -> torch.Tensor:
    """x (heads, P), its first 2R dimensions turned as R pairs (i, i + R)."""
    if inv_freq is None:
        return x
    pairs = len(inv_freq)
    angle = position * inv_freq
    cos, sin = angle.cos(), angle.sin()
    a, b = x[:, :pairs], x[:, pairs : 2 * pairs]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[:, 2 * pairs :]], -1)
