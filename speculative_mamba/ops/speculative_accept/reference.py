"""The specification in PyTorch."""

import torch

from ..noise import Purpose, exponentials, uniform
from ..sampling import ROUNDING, RowStatus, adjust_logits, gumbel_argmax, probs_from_logits, row_status
from . import SpeculativeAcceptArgs


def speculative_accept(args: SpeculativeAcceptArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, device = len(args.logits), args.logits.device
    accepted, status = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
    next_token = torch.zeros(batch, dtype=torch.int64, device=device)
    for row in range(batch):
        if args.active is None or args.active[row]:
            status[row], accepted[row], next_token[row] = _row(args, row)
    return accepted, next_token, status


def _row(args: SpeculativeAcceptArgs, row: int) -> tuple[RowStatus, int, int]:
    """Status, accepted, next token; for a status other than OK ``accepted`` is the position."""
    logits, sampling = args.logits[row], args.sampling.rows_of(slice(row, row + 1))
    key, position = args.rng_keys[row].tolist(), int(args.positions[row])
    lookahead, vocabulary = len(logits) - 1, logits.shape[-1]
    draft_tokens = args.text_tokens[row]
    counted = len(draft_tokens) - lookahead  # further tokens of the text
    end = lookahead if args.num_draft_tokens is None else min(lookahead, int(args.num_draft_tokens[row]))
    greedy = sampling.temperature.item() == 0
    for at in range(end + 1):
        if at and args.is_stop is not None and args.is_stop[row, draft_tokens[counted + at - 1]]:
            return RowStatus.OK, at, 0
        prompt_mask, output_counts = args.prompt_mask, args.output_counts
        if sampling.has_penalties:
            window = torch.bincount(draft_tokens[: counted + at], minlength=vocabulary)
            prompt_mask, output_counts = prompt_mask[row : row + 1], output_counts[row : row + 1] + window
        adjusted = adjust_logits(logits[at : at + 1], sampling, prompt_mask, output_counts)
        if status := row_status(adjusted[0], greedy):
            return status, at, 0
        p = probs_from_logits(adjusted, sampling)[0]
        if args.target_probs is not None:
            args.target_probs[row] = p
        noise = exponentials(vocabulary, key, position + at, Purpose(args.purpose), logits.device)
        if at == end or greedy or args.coupled:
            choice = gumbel_argmax(p, noise)
            if at == end or choice != draft_tokens[counted + at]:
                return RowStatus.OK, at, choice
            continue
        token = int(draft_tokens[counted + at])
        q = torch.zeros_like(p)
        q[token] = 1
        if args.draft_probs is not None:
            q = args.draft_probs[row, at]
        of_draft, of_target = q[token].item(), p[token].item()
        if not 0 < of_draft < torch.inf:
            return RowStatus.BAD_DRAFT_PROBS, at, 0
        if uniform(key, position + at, Purpose.TEST) * of_draft < of_target:
            continue
        residual = torch.where(p > 0, p - q, 0).clamp(min=0)
        total = residual.double().sum().item()
        if total == 0 and of_draft - of_target < ROUNDING:
            residual = p  # only rounding left the refused token's excess uncovered
        elif not 0 < total < torch.inf:
            return RowStatus.BAD_RESIDUAL, at, 0
        return RowStatus.OK, at, gumbel_argmax(residual, noise)
    raise AssertionError("the last position always returns")
