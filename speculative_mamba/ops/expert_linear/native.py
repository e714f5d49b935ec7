"""Binding to csrc/cpu/expert_linear.cpp and csrc/cuda/expert_linear.cu."""

import torch

from ..backend import compiled
from ..recording import new_result, scratch
from . import ExpertLinearArgs


def expert_linear(args: ExpertLinearArgs) -> torch.Tensor:
    x, weight = args.x, args.weight
    tokens, top_k = args.experts.shape
    _, out_features, in_features = weight.shape
    y = new_result(x, tokens, top_k if args.expert_weights is None else 1, out_features)
    kernels, where = compiled(x)
    kernels.expert_linear(
        args, where, activations=x.dtype, tokens=tokens, top_k=top_k, inputs=x.shape[1], num_experts=weight.shape[0],
        in_features=in_features, out_features=out_features, weight=weight[0], offsets=weight.offsets, y=y,
        scratch=scratch(x),
    )  # fmt: skip
    return y
