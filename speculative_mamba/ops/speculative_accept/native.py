"""Binding to csrc/cpu/speculative_accept.cpp and csrc/cuda/speculative_accept.cu."""

from dataclasses import fields

import torch

from ..backend import address, compiled
from ..recording import scratch
from ..sampling_tensors import SamplingTensors
from .arguments import AcceptArgs


def speculative_accept(logits: torch.Tensor, args: AcceptArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, vocabulary = logits.shape
    accepted, row_status = (logits.new_empty(batch, dtype=torch.int32) for _ in range(2))
    next_token = logits.new_empty(batch, dtype=torch.int64)
    kernels, where = compiled(logits)
    sampling = args.sampling
    adjusted = 4 * vocabulary if sampling.has_penalties or sampling.bias_capacity else 0
    words = -(-vocabulary // 64) + -(-vocabulary // 512) + 1
    memory = scratch(kernels, logits, batch * tokens * (8 * words + adjusted), torch.uint8)
    kernels.speculative_accept(
        batch, tokens, vocabulary, logits.data_ptr(), logits.stride()[:2], args.draft_tokens.data_ptr(),
        args.draft_tokens.shape[1], address(args.draft_probs),
        (0, 0) if args.draft_probs is None else args.draft_probs.stride()[:2], _addresses(sampling),
        sampling.bias_capacity, args.coupled, args.purpose, address(args.prompt_mask), address(args.output_counts),
        args.rng_keys.data_ptr(), args.positions.data_ptr(), address(args.active), address(args.num_draft_tokens),
        address(args.target_probs), 0 if args.target_probs is None else args.target_probs.stride(0),
        accepted.data_ptr(), next_token.data_ptr(), row_status.data_ptr(), memory.data_ptr(), where,
    )  # fmt: skip
    return accepted, next_token, row_status


def _addresses(sampling: SamplingTensors) -> list[int]:
    return [address(getattr(sampling, field.name)) for field in fields(sampling)]
