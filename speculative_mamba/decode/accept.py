"""Which drafted tokens stand, and what comes after them."""

import torch

from .sampling import SamplingParams, draw, filtered_probabilities, greedy_tokens, uniform


def accept_greedy(logits: torch.Tensor, drafted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps drafted tokens up to the first that is not the target's own choice.

    logits: (B, K+1, V) of the target after each window token. drafted: (B, K) int64.
    Returns accepted (B) int32 and the next token (B) int64.
    """
    choices = greedy_tokens(logits)
    accepted = (choices[:, :-1] == drafted).int().cumprod(1).sum(1)
    return accepted.int(), choices.gather(1, accepted[:, None]).squeeze(1)


def accept_rejection(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    laws: torch.Tensor | None,
    sampling: SamplingParams,
    generators: list[torch.Generator],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling: the text follows the target's law, whatever the draft (Leviathan et al. 2023, algorithm 1).

    A drafted token d is accepted if u·q(d) < p(d), u uniform in [0, 1). At the first rejection the next token is drawn
    from the residual max(p - q, 0). ``laws`` (B, K, V) are the very rows the drafted tokens were drawn from; None means
    that each was certain. Other arguments and results as in ``accept_greedy``.

    Raises:
        ValueError: a residual is empty or not finite; it names row and position.
    """
    target = filtered_probabilities(logits, sampling)
    accepted, following = [], []
    for row, generator in enumerate(generators):
        count, residual = 0, None
        for position, token in enumerate(drafted[row].tolist()):
            p = target[row, position]
            q = _certain(p, token) if laws is None else laws[row, position]
            if not uniform(generator) * q[token].item() < p[token].item():
                residual = (p - q).clamp_(min=0)
                break
            count += 1
        try:
            following.append(draw(target[row, count] if residual is None else residual, generator))
        except ValueError as error:
            raise ValueError(f"row {row}, position {count} of the window: {error}") from None
        accepted.append(count)
    device = logits.device
    return torch.tensor(accepted, dtype=torch.int32, device=device), torch.tensor(following, device=device)


def _certain(like: torch.Tensor, token: int) -> torch.Tensor:
    law = torch.zeros_like(like)
    law[token] = 1
    return law
