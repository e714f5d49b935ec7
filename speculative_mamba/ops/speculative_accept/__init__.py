"""Which drafted tokens stand, and the token after them."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import (
    check,
    check_active,
    check_keys,
    check_limits,
    check_seen,
    check_tokens,
    check_verdicts,
    check_written,
)
from ..filters import Filters
from ..law import raise_for


class SpeculativeAcceptArgs(NamedTuple):
    """The arguments of ``speculative_accept``, as every backend takes them."""

    logits: torch.Tensor
    drafted: torch.Tensor
    laws: torch.Tensor | None
    filters: Filters
    keys: torch.Tensor
    positions: torch.Tensor
    coupled: bool
    seen: torch.Tensor | None
    active: torch.Tensor | None
    limits: torch.Tensor | None


def speculative_accept(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    laws: torch.Tensor | None,
    filters: Filters,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    coupled: bool = False,
    seen: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    limits: torch.Tensor | None = None,
    verdicts: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters, tests and resamples: each row keeps its drafted tokens up to the first that the target refuses.

    | argument  | shape       | dtype   | notes |
    |-----------|-------------|---------|-------|
    | logits    | (B, K+1, V) | float32 | of the target, after each token of the window |
    | drafted   | (B, K)      | int64   | K may be 0 |
    | laws      | (B, K, V)   | float32, None | the very rows the drafted tokens come from; None: all certain |
    | filters   |             |         | from logits to the law; greedy at temperature 0 or top-k 1 |
    | keys      | (B, 2)      | int64   | seed and stream of each row |
    | positions | (B)         | int64   | of the first token that is chosen, counted from the start of its text |
    | coupled   | bool        |         | how drafted tokens are tested |
    | seen      | (B, V)      | bool, None | tokens of each text before the drafted ones; for a repetition penalty |
    | active    | (B)         | bool, None | rows to decide; the others get 0 and 0 |
    | limits    | (B)         | int32, None | at least 0 if active: as if it were the K of its row |
    | verdicts  | (B)         | int32, None | **written**: 0 where a row is decided, else why it cannot be |
    | returns   | accepted (B) int32, next token (B) int64 | | |

    Greedy and ``coupled``: the target chooses as ``sample_tokens`` would, position by position; a drafted token stands
    if it is that choice (Gumbel coupling, arXiv 2408.07978). The choices do not depend on the draft.
    Otherwise (Leviathan et al. 2023, algorithm 1): token d stands if u·q(d) < p(d), u uniform in [0, 1); the token
    after the first refused one is drawn from the residual max(p - q, 0), the token after the last from p.
    Position j sees ``seen`` and the drafted tokens before it. What lies behind a refused token is never looked at.

    With ``verdicts`` the call does not wait for the device and raises nothing for logits and laws: of such a row
    ``accepted`` is the position, the next token is 0, and ``ops.law.raise_for(verdicts, accepted)`` raises it later.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; logits that matter are NaN or infinite; a law gives
            its own token no probability; a residual is empty or not finite. It names row and position of the window.
    """
    if logits.ndim != 3 or not logits.shape[1] or not logits.shape[2]:
        raise ValueError(f"logits must have shape (B, K+1, V), got {tuple(logits.shape)}")
    batch, tokens, vocabulary = logits.shape
    check("logits", logits, logits.shape, logits)
    check_tokens("drafted", drafted, (batch, tokens - 1), vocabulary, logits)
    check_keys(keys, positions, batch, logits)
    check_active(active, batch, logits)
    check_limits(limits, active, batch, logits)
    check_verdicts(verdicts, batch, logits)
    if laws is not None:
        check("laws", laws, (batch, tokens - 1, vocabulary), logits)
    check_seen(filters, seen, batch, vocabulary, logits)
    read = {"logits": logits, "drafted": drafted, "laws": laws, "keys": keys, "positions": positions}
    check_written({"verdicts": verdicts}, read | {"seen": seen, "active": active, "limits": limits})
    args = SpeculativeAcceptArgs(
        logits, drafted, laws, filters, keys, positions, coupled, seen, active, limits,
    )  # fmt: skip
    accepted, following, found = run("speculative_accept", backend, args)
    if verdicts is None:
        raise_for(found, accepted)
    else:
        verdicts.copy_(found)
    return accepted, following
