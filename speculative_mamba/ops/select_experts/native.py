"""Binding to csrc/cpu/select_experts.cpp and csrc/cuda/select_experts.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import SelectExpertsArgs


def select_experts(args: SelectExpertsArgs) -> tuple[torch.Tensor, torch.Tensor]:
    logits = args.logits
    rows, num_experts = logits.shape
    weights = new_result(logits, rows, args.top_k)
    experts = new_result(logits, rows, args.top_k, dtype=torch.int32)
    kernels, where = compiled(logits)
    kernels.select_experts(args, where, rows=rows, num_experts=num_experts, weights=weights, experts=experts)
    return weights, experts
