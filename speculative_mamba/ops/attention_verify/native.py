"""Binding to csrc/cpu/attention_verify.cpp and csrc/cuda/attention_verify.cu."""

import torch

from ..backend import compiled
from ..recording import new_result, scratch
from . import AttentionVerifyArgs


def attention_verify(args: AttentionVerifyArgs) -> torch.Tensor:
    q = args.q
    batch, tokens, heads, dims = q.shape
    y = new_result(q, batch, tokens, heads, dims)
    kernels, where = compiled(q)
    kernels.attention_verify(
        args, where, activations=q.dtype, batch=batch, tokens=tokens, heads=heads, kv_heads=args.k.shape[2], dims=dims,
        slots=args.lengths.shape[1], capacity=args.keys.shape[2],
        pairs=0 if args.inv_freq is None else len(args.inv_freq), y=y, scratch=scratch(q),
    )  # fmt: skip
    return y
