"""The specification in PyTorch."""

import torch

from . import EmbedTokensArgs


def embed_tokens(args: EmbedTokensArgs) -> torch.Tensor:
    return torch.embedding(args.table, args.tokens.reshape(-1)).to(args.out_dtype)
