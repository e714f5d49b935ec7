"""A program takes a token. Experts are laid out as groups times their members, both rounded up to powers of two."""

import torch
import triton
import triton.language as tl

from ..triton_math import exp, launch, row_sums
from . import SCORES, SelectExpertsArgs

WARPS = 1
LEAST = tl.constexpr(-(2**31))  # the key of nothing that may still be chosen


@triton.jit
def _keys(values):
    """Whole numbers in the order of the values; NaN comes last, zeros of both signs are equal."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(values == values, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def _select(
    logits, bias, weights, experts, row_stride, num_experts, groups, top_k_groups, top_k, epsilon, scale,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, CHOSEN: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    size = num_experts // groups
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, MEMBERS)[None, :]
    exists = (group < groups) & (member < size)
    expert = group * size + member
    values = tl.load(logits + row * row_stride + expert, mask=exists, other=float("-inf"))
    if SIGMOID:
        values = tl.where(exists, values, 0.0)
        scores = tl.div_rn(tl.full(values.shape, 1.0, tl.float32), 1.0 + exp(-values))
    else:
        numerators = tl.where(exists, exp(values - tl.max(tl.max(values, axis=1), axis=0)), 0.0)
        total = tl.sum(row_sums(tl.reshape(numerators, (1, GROUPS * MEMBERS))), axis=0)
        scores = tl.div_rn(numerators, tl.zeros_like(numerators) + total)
    choice = scores
    if bias is not None:
        choice += tl.load(bias + expert, mask=exists, other=0)
    keys = tl.where(exists, _keys(choice), LEAST)
    if GROUPS > 1:
        first = tl.max(keys, axis=1)
        at = tl.min(tl.where(keys == first[:, None], member, MEMBERS), axis=1)
        second = tl.max(tl.where(member == at[:, None], LEAST, keys), axis=1)
        is_second = (keys == second[:, None]) & (member != at[:, None])
        second_at = tl.min(tl.where(is_second, member, MEMBERS), axis=1)
        best = tl.sum(tl.where(member == at[:, None], choice, 0.0), axis=1)
        best += tl.sum(tl.where(member == second_at[:, None], choice, 0.0), axis=1)
        number = tl.arange(0, GROUPS)
        left = tl.where(number < groups, _keys(best), LEAST)
        for _ in range(top_k_groups):
            winner = tl.min(tl.where(left == tl.max(left, axis=0), number, GROUPS), axis=0)
            left = tl.where(number == winner, LEAST, left)
        keys = tl.where((left == LEAST)[:, None], keys, LEAST)
    place = tl.arange(0, CHOSEN)
    chosen = tl.zeros((CHOSEN,), tl.int32)
    kept = tl.zeros((CHOSEN,), tl.float32)
    total = 0.0
    for i in range(top_k):
        top = tl.max(tl.max(keys, axis=1), axis=0)
        winner = tl.min(tl.min(tl.where(keys == top, expert, num_experts), axis=1), axis=0)
        score = tl.sum(tl.sum(tl.where((expert == winner) & exists, scores, 0.0), axis=1), axis=0)
        keys = tl.where(expert == winner, LEAST, keys)
        chosen = tl.where(place == i, winner, chosen)
        kept = tl.where(place == i, score, kept)
        total += score
    if NORMALIZE:
        kept = tl.div_rn(kept, tl.zeros_like(kept) + (total + epsilon))
    tl.store(weights + row * top_k + place, kept * scale, mask=place < top_k)
    tl.store(experts + row * top_k + place, chosen, mask=place < top_k)


def select_experts(args: SelectExpertsArgs) -> tuple[torch.Tensor, torch.Tensor]:
    logits = args.logits
    rows, num_experts = logits.shape
    weights = logits.new_empty(rows, args.top_k)
    experts = torch.empty(rows, args.top_k, dtype=torch.int32, device=logits.device)
    launch(
        _select, rows, logits, WARPS, logits=logits, bias=args.bias, weights=weights, experts=experts,
        row_stride=logits.stride(0), num_experts=num_experts, groups=args.groups, top_k_groups=args.top_k_groups,
        top_k=args.top_k, epsilon=args.epsilon, scale=args.scale, GROUPS=triton.next_power_of_2(args.groups),
        MEMBERS=triton.next_power_of_2(num_experts // args.groups), CHOSEN=triton.next_power_of_2(args.top_k),
        SIGMOID=SCORES[args.score] == "sigmoid", NORMALIZE=args.normalize,
    )  # fmt: skip
    return weights, experts
