"""Which drafted tokens stand, and what comes after them."""

import torch

from .sampling import SamplingParams, draw, filtered_probabilities, greedy_tokens, uniform


def accept_greedy(logits: torch.Tensor, drafted: torch.Tensor, active: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps drafted tokens up to the first that is not the target's own choice.

    logits: (B, K+1, V) of the target after each window token. drafted: (B, K) int64. active: the rows whose result
    matters. Returns accepted (B) int32 and the next token (B) int64.

    Raises:
        ValueError: logits that a row's text depends on are NaN.
    """
    choices = greedy_tokens(logits)
    accepted = (choices[:, :-1] == drafted).int().cumprod(1).sum(1)
    counts, broken = accepted.tolist(), _broken_positions(logits)
    for row in active:
        _refuse_broken(broken, row, counts[row])
    return accepted.int(), choices.gather(1, accepted[:, None]).squeeze(1)


def accept_rejection(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    laws: torch.Tensor | None,
    sampling: SamplingParams,
    generators: list[torch.Generator],
    active: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling: the text follows the target's law, whatever the draft (Leviathan et al. 2023, algorithm 1).

    A drafted token d is accepted if u·q(d) < p(d), u uniform in [0, 1). At the first rejection the next token is drawn
    from the residual max(p - q, 0). ``laws`` (B, K, V) are the very rows the drafted tokens were drawn from; None means
    that each was certain. Other arguments and results as in ``accept_greedy``.

    Raises:
        ValueError: logits that a row's text depends on are NaN, or a residual is empty; it names row and position.
    """
    target, broken = filtered_probabilities(logits, sampling), _broken_positions(logits)
    accepted, following = torch.zeros(len(logits), dtype=torch.int32), torch.zeros(len(logits), dtype=torch.int64)
    for row in active:
        generator = generators[row]
        count, residual = 0, None
        for position, token in enumerate(drafted[row].tolist()):
            _refuse_broken(broken, row, position)
            p = target[row, position]
            q = _certain(p, token) if laws is None else laws[row, position]
            if not uniform(generator) * q[token].item() < p[token].item():
                residual = (p - q).clamp_(min=0)
                break
            count += 1
        _refuse_broken(broken, row, count)
        try:
            following[row] = draw(target[row, count] if residual is None else residual, generator)
        except ValueError as error:
            raise ValueError(f"row {row}, position {count} of the window: {error}") from None
        accepted[row] = count
    return accepted.to(logits.device), following.to(logits.device)


def _broken_positions(logits: torch.Tensor) -> list[list[bool]]:
    return logits.amax(-1).isnan().tolist()


def _refuse_broken(broken: list[list[bool]], row: int, last: int) -> None:
    """NaN behind a rejected token concerns nobody: plain decoding would not have computed it."""
    if any(broken[row][: last + 1]):
        raise ValueError(
            f"the target's logits are NaN in row {row}, position {broken[row].index(True)} of the window; "
            "the checkpoint is broken or its numbers overflow"
        )


def _certain(like: torch.Tensor, token: int) -> torch.Tensor:
    law = torch.zeros_like(like)
    law[token] = 1
    return law
