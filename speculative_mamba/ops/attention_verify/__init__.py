"""Causal grouped-query attention of a window of tokens over a cache that goes back by its length."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import (
    WEIGHT_DTYPES,
    check,
    check_activations,
    check_contiguous,
    check_left_padding,
    check_slots,
    check_written,
)
from ..library import operator


class AttentionVerifyArgs(NamedTuple):
    """The arguments of ``attention_verify``, as every backend takes them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    start_slot: torch.Tensor
    write_slot: int
    inv_freq: torch.Tensor | None
    scale: float
    left_padding: torch.Tensor | None
    final_state_only: bool


@operator(writes=("keys", "values", "lengths"), returns=lambda q, **_: q.new_empty(q.shape))
def attention_verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int = 0,
    *,
    inv_freq: torch.Tensor | None = None,
    scale: float | None = None,
    left_padding: torch.Tensor | None = None,
    final_state_only: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Attends T tokens per row to the text that slot ``start_slot`` ends and to themselves.

    | argument     | shape        | dtype         | notes |
    |--------------|--------------|---------------|-------|
    | q            | (B, T, H, P) | activations   | heads contiguous |
    | k, v         | (B, T, G, P) | as q          | heads contiguous; G divides H, query head h reads head h·G // H |
    | keys, values | (B, G, L, P) | any of three  | **written**; (L, P) contiguous; float32, bfloat16 or float16 |
    | lengths      | (B, S)       | int32         | **written**; contiguous; entries that are slot j's text |
    | start_slot   | (B)          | int32         | slot of the last committed token; -1: left out |
    | write_slot   | int          |               | slot of the first token of the window |
    | inv_freq     | (R)          | float32, None | rotary embedding, radians per position; 2R <= P |
    | scale        | float        |               | of q·k; None: P**-0.5 |
    | left_padding | (B)          | int32, None   | that many leading tokens of a row count as nothing: y is 0 |
    | final_state_only    | bool         |               | prefill: only the last length is written, to slot 0 |
    | returns      | (B, T, H, P) | as q          | |

    With n = ``lengths[b, start_slot[b]]``, token t is at position n + t: its key and its value become entry n + t, it
    attends to entries 0 … n + t, and ``lengths[b, write_slot + t]`` becomes n + t + 1. Going back to any token is
    choosing its slot: entries beyond a length are never read, and the next tokens write over them. A left padding takes
    no position and no entry, and leaves the length as it was. Who owns the bookkeeping: the caller sets ``start_slot``
    after acceptance, nothing else. Of a row with ``start_slot`` -1 nothing is read or written, and its y is 0.

    Dimensions i and i + R of q and k are rotated by position · ``inv_freq[i]`` (Su et al. 2021, arXiv 2104.09864), the
    keys before they are stored. Arithmetic is float32; a token sees its own key and value as the cache holds them.

    Equivalent to ``scaled_dot_product_attention`` of the rotated q over the row's entries. T tokens in one call give
    the same bits as T calls of one token, whatever L and the batch are.

    A recorded call is run again without checks: then the caller sees to it that every row fits into the cache.

    Raises:
        ValueError: a shape, dtype, stride, device or slot does not fit, or the cache has no room (CPU only).
    """
    if q.ndim != 4 or k.ndim != 4 or keys.ndim != 4 or lengths.ndim != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, keys, lengths))
        raise ValueError(f"q, k and keys need 4 dimensions, lengths 2, got {shapes}")
    batch, tokens, heads, dims = q.shape
    kv_heads, capacity, slots = k.shape[2], keys.shape[2], lengths.shape[1]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"the heads of k must divide those of q, got {kv_heads} and {heads}")
    check_activations("q", q, backend)
    for name, tensor, count in (("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads)):
        check(name, tensor, (batch, tokens, count, dims), q, q.dtype)
        if count > 1 and tensor.stride(2) != dims:
            raise ValueError(f"{name} must be contiguous in its last two dimensions, got strides {tensor.stride()}")
    check("keys", keys, (batch, kv_heads, capacity, dims), q, WEIGHT_DTYPES)
    check("values", values, keys.shape, q, keys.dtype)
    for name, tensor in (("keys", keys), ("values", values)):
        if capacity > 1 and tensor.stride(2) != dims:
            raise ValueError(f"{name} must be contiguous in its last two dimensions, got strides {tensor.stride()}")
    check("lengths", lengths, (batch, slots), q, torch.int32)
    check_contiguous("lengths", lengths)
    if inv_freq is not None:
        if inv_freq.ndim != 1 or 2 * len(inv_freq) > dims:
            raise ValueError(f"inv_freq must be (R) with 2R <= {dims}, got {tuple(inv_freq.shape)}")
        check("inv_freq", inv_freq, inv_freq.shape, q)
    check_slots(q[:, :, 0], slots, start_slot, write_slot, final_state_only)
    check_left_padding(left_padding, batch, q)
    read = {"q": q, "k": k, "v": v, "start_slot": start_slot, "inv_freq": inv_freq, "left_padding": left_padding}
    check_written({"keys": keys, "values": values, "lengths": lengths}, read)
    if q.device.type == "cpu":
        _check_room(tokens, capacity, lengths, start_slot, left_padding)
    scale = dims**-0.5 if scale is None else scale
    args = AttentionVerifyArgs(
        q, k, v, keys, values, lengths, start_slot, write_slot, inv_freq, scale, left_padding, final_state_only,
    )  # fmt: skip
    return run("attention_verify", backend, args)


def _check_room(
    tokens: int, capacity: int, lengths: torch.Tensor, start_slot: torch.Tensor, left_padding: torch.Tensor | None
) -> None:
    padding = [0] * len(lengths) if left_padding is None else left_padding.tolist()
    for row, slot, left in zip(lengths.tolist(), start_slot.tolist(), padding, strict=True):
        new = tokens - min(max(left, 0), tokens)
        if slot >= 0 and not 0 <= row[slot] <= capacity - new:
            raise ValueError(f"{new} tokens after {row[slot]} do not fit into a cache of {capacity} entries")
