"""Binding to csrc/cpu/embed_tokens.cpp and csrc/cuda/embed_tokens.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import EmbedTokensArgs


def embed_tokens(args: EmbedTokensArgs) -> torch.Tensor:
    batch, tokens = args.tokens.shape
    features = args.table.shape[1]
    y = new_result(args.table, batch * tokens, features, dtype=args.out_dtype)
    kernels, where = compiled(args.table)
    kernels.embed_tokens(
        args, where, batch=batch, window=tokens, features=features, activations=args.out_dtype, y=y,
    )  # fmt: skip
    return y
