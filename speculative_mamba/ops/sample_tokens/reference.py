"""The specification in PyTorch."""

import torch

from ..filters import Filters
from ..law import draw, filtered_law, penalised, verdict
from ..noise import Purpose, exponentials


def sample_tokens(
    logits: torch.Tensor,
    filters: Filters,
    keys: torch.Tensor,
    positions: torch.Tensor,
    purpose: int,
    laws: torch.Tensor | None,
    seen: torch.Tensor | None,
    recent: torch.Tensor,
    active: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, vocabulary = logits.shape
    tokens = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    verdicts = torch.zeros(batch, dtype=torch.int32, device=logits.device)
    for row in range(batch):
        if active is not None and not active[row]:
            continue
        adjusted = logits[row]
        if filters.repetition_penalty != 1:
            adjusted = penalised(adjusted, filters.repetition_penalty, seen[row].index_fill(0, recent[row], True))
        verdicts[row] = code = verdict(adjusted, filters)
        if code:
            continue
        law = filtered_law(adjusted, filters)
        noise = exponentials(vocabulary, keys[row].tolist(), int(positions[row]), Purpose(purpose), logits.device)
        tokens[row] = draw(law, noise)
        if laws is not None:
            laws[row] = law
    return tokens, verdicts
