"""The specification in PyTorch."""

import torch

from ..filters import Filters
from ..law import ROUNDING, draw, filtered_law, penalised, verdict
from ..noise import Purpose, exponentials, uniform
from . import SpeculativeAcceptArgs


def speculative_accept(args: SpeculativeAcceptArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, device = len(args.logits), args.logits.device
    accepted, verdicts = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
    following = torch.zeros(batch, dtype=torch.int64, device=device)
    for row in range(batch):
        if args.active is None or args.active[row]:
            counted = args.drafted[row] if args.limits is None else args.drafted[row, : args.limits[row]]
            verdicts[row], accepted[row], following[row] = _row(
                args.logits[row], counted, None if args.laws is None else args.laws[row], args.filters,
                args.keys[row].tolist(), int(args.positions[row]), args.coupled,
                None if args.seen is None else args.seen[row],
            )  # fmt: skip
    return accepted, following, verdicts


def _row(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    laws: torch.Tensor | None,
    filters: Filters,
    key: list[int],
    position: int,
    coupled: bool,
    seen: torch.Tensor | None,
) -> tuple[int, int, int]:
    """Verdict, accepted, next token; for a verdict other than 0 ``accepted`` is the position."""
    lookahead, vocabulary = len(drafted), logits.shape[-1]
    for at in range(lookahead + 1):
        adjusted = logits[at]
        if filters.repetition_penalty != 1:
            adjusted = penalised(adjusted, filters.repetition_penalty, seen.index_fill(0, drafted[:at], True))
        if code := verdict(adjusted, filters):
            return code, at, 0
        p = filtered_law(adjusted, filters)
        noise = exponentials(vocabulary, key, position + at, Purpose.TOKEN, logits.device)
        if at == lookahead or filters.greedy or coupled:
            choice = draw(p, noise)
            if at == lookahead or choice != drafted[at]:
                return 0, at, choice
            continue
        token = int(drafted[at])
        q = torch.zeros_like(p).index_fill(0, drafted[at], 1) if laws is None else laws[at]
        of_draft, of_target = q[token].item(), p[token].item()
        if not 0 < of_draft < torch.inf:
            return 4, at, 0
        if uniform(key, position + at, Purpose.TEST) * of_draft < of_target:
            continue
        residual = torch.where(p > 0, p - q, 0).clamp(min=0)
        total = residual.double().sum().item()
        if total == 0 and of_draft - of_target < ROUNDING:
            residual = p  # only the laws' own rounding left the refused token's excess uncovered
        elif not 0 < total < torch.inf:
            return 5, at, 0
        return 0, at, draw(residual, noise)
    raise AssertionError("the last position always returns")
