"""The specification in PyTorch. Row by row, because PyTorch rounds exponentials by where a value lies in its tensor."""

import torch

from . import SCORES, SelectExpertsArgs


def select_experts(args: SelectExpertsArgs) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [_row(row.contiguous(), args) for row in args.logits]
    if not rows:
        empty = args.logits.new_empty(0, args.top_k)
        return empty, empty.int()
    weights, experts = zip(*rows, strict=True)
    return torch.stack(weights), torch.stack(experts)


def _row(logits: torch.Tensor, args: SelectExpertsArgs) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid() if SCORES[args.score] == "sigmoid" else logits.softmax(-1)
    choice = scores if args.bias is None else scores + args.bias
    if args.groups > 1:
        grouped = choice.view(args.groups, -1)
        best_two = grouped.sort(dim=-1, descending=True, stable=True).values[:, :2].sum(-1)
        kept = _best(best_two, args.top_k_groups)
        choice = torch.full_like(grouped, -torch.inf).index_copy(0, kept, grouped[kept]).flatten()
    experts = _best(choice, args.top_k)
    weights = scores[experts]
    if args.normalize:
        weights = weights / (sum(weights) + args.epsilon)
    return weights * args.scale, experts.int()


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Of the highest, NaN being higher than any number; of equals the first."""
    return values.sort(dim=0, descending=True, stable=True).indices[:count]
