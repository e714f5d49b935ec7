"""The specification in PyTorch, in the dtype of q: float32, in which 16 bits are computed too, or float64 to
measure the kernels' error. Keys and values are rounded to the dtype of the cache.

Token by token and without matrix products, because PyTorch rounds sums by the shapes of their tensors.
"""

import torch


def attention_verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int,
    inv_freq: torch.Tensor | None,
    scale: float,
    null_columns: torch.Tensor | None,
    keep_last: bool,
) -> torch.Tensor:
    if q.dtype in (torch.bfloat16, torch.float16):
        wide = q.float(), k.float(), v.float()
        rest = lengths, start_slot, write_slot, inv_freq, scale, null_columns, keep_last
        return attention_verify(*wide, keys, values, *rest).to(q.dtype)
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    y = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b in range(batch):
        if start_slot[b] < 0:
            continue
        length = int(lengths[b, start_slot[b]])
        for t in range(tokens):
            if null_columns is None or t >= null_columns[b]:
                keys[b, :, length] = rotate(k[b, t], length, inv_freq)
                values[b, :, length] = v[b, t]
                query = (rotate(q[b, t], length, inv_freq) * scale).unflatten(0, (kv_heads, heads // kv_heads))
                length += 1
                entries = [cache[b, :, :length].to(q.dtype).contiguous()[:, None] for cache in (keys, values)]
                weights = torch.softmax((query[:, :, None] * entries[0]).sum(-1), -1)
                y[b, t] = (weights[..., None] * entries[1]).sum(-2).flatten(0, 1)
            if not keep_last:
                lengths[b, write_slot + t] = length
        if keep_last:
            lengths[b, 0] = length
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
