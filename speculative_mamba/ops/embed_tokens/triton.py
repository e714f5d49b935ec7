"""Rows of the embedding in Triton."""

import torch
import triton
import triton.language as tl

from ..triton_math import launch, narrow, widen
from . import EmbedTokensArgs

FEATURES = 512  # of a program


@triton.jit
def _embed(tokens, table, y, tokens_row_stride, table_row_stride, window, features, BLOCK: tl.constexpr):
    blocks = tl.cdiv(features, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    feature = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = feature < features
    token = tl.load(tokens + row // window * tokens_row_stride + row % window)
    value = widen(tl.load(table + token * table_row_stride + feature, exists))
    tl.store(y + row * features + feature, narrow(value, y.dtype.element_ty), exists)


def embed_tokens(args: EmbedTokensArgs) -> torch.Tensor:
    (batch, window), features = args.tokens.shape, args.table.shape[1]
    y = args.table.new_empty(batch * window, features, dtype=args.out_dtype)
    launch(
        _embed, len(y) * triton.cdiv(features, FEATURES), y, 4, tokens=args.tokens, table=args.table, y=y,
        tokens_row_stride=args.tokens.stride(0), table_row_stride=args.table.stride(0), window=window,
        features=features, BLOCK=FEATURES,
    )  # fmt: skip
    return y
