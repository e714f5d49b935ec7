"""Binding to csrc/cpu/attention_verify.cpp and csrc/cuda/attention_verify.cu."""

import torch

from ..backend import DTYPE_CODE, address, compiled, scratch
from ..recording import new_result

CHUNK, SEGMENT = 256, 64  # entries, tokens: as in csrc/cuda/attention_verify.cu


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
    (batch, tokens, heads, dims), capacity = q.shape, keys.shape[2]
    y = new_result(q, batch, tokens, heads, dims)
    kernels, where = compiled(q)
    chunks = min(tokens, SEGMENT) * -(-capacity // CHUNK)
    memory = scratch(kernels, q, batch * (heads * (tokens * dims + chunks * (dims + 2)) + 1), torch.float32)
    kernels.attention(
        DTYPE_CODE[q.dtype], batch, tokens, heads, k.shape[2], dims, lengths.shape[1], capacity, q.data_ptr(),
        q.stride()[:2], k.data_ptr(), k.stride()[:2], v.data_ptr(), v.stride()[:2], keys.data_ptr(), keys.stride()[:2],
        values.data_ptr(), values.stride()[:2], DTYPE_CODE[keys.dtype], lengths.data_ptr(), start_slot.data_ptr(),
        address(null_columns), write_slot, keep_last, address(inv_freq), 0 if inv_freq is None else len(inv_freq),
        scale, y.data_ptr(), memory.data_ptr(), memory.numel(), where,
    )  # fmt: skip
    return y
