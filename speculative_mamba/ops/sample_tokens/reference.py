"""The specification in PyTorch."""

import torch

from ..law import draw, filtered_law, penalised, verdict
from ..noise import Purpose, exponentials
from . import SampleTokensArgs


def sample_tokens(args: SampleTokensArgs) -> tuple[torch.Tensor, torch.Tensor]:
    (batch, vocabulary), device, filters = args.logits.shape, args.logits.device, args.filters
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    verdicts = torch.zeros(batch, dtype=torch.int32, device=device)
    for row in range(batch):
        if args.active is not None and not args.active[row]:
            continue
        adjusted = args.logits[row]
        if filters.repetition_penalty != 1:
            seen = args.seen[row].index_fill(0, args.recent[row], True)
            adjusted = penalised(adjusted, filters.repetition_penalty, seen)
        verdicts[row] = code = verdict(adjusted, filters)
        if code:
            continue
        law = filtered_law(adjusted, filters)
        key, position = args.keys[row].tolist(), int(args.positions[row])
        tokens[row] = draw(law, exponentials(vocabulary, key, position, Purpose(args.purpose), device))
        if args.laws is not None:
            args.laws[row] = law
    return tokens, verdicts
