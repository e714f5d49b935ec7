"""One token per row from filtered logits, and the law it was drawn from."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import check, check_active, check_keys, check_seen, check_tokens, check_verdicts, check_written
from ..filters import Filters
from ..law import raise_for
from ..noise import Purpose


class SampleTokensArgs(NamedTuple):
    """The arguments of ``sample_tokens``, as every backend takes them."""

    logits: torch.Tensor
    filters: Filters
    keys: torch.Tensor
    positions: torch.Tensor
    purpose: int
    laws: torch.Tensor | None
    seen: torch.Tensor | None
    recent: torch.Tensor
    active: torch.Tensor | None


def sample_tokens(
    logits: torch.Tensor,
    filters: Filters,
    keys: torch.Tensor,
    positions: torch.Tensor,
    purpose: Purpose = Purpose.TOKEN,
    *,
    laws: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    recent: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    verdicts: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Draws a token for every row, with noise that depends on seed, stream, position and purpose alone.

    | argument  | shape  | dtype   | notes |
    |-----------|--------|---------|-------|
    | logits    | (B, V) | float32 | |
    | filters   |        |         | penalty, temperature, top-k, top-p, min-p; greedy at temperature 0 or top-k 1 |
    | keys      | (B, 2) | int64   | seed and stream of each row |
    | positions | (B)    | int64   | of the token that is drawn, counted from the start of its text |
    | purpose   |        |         | numbers of different purposes are independent |
    | laws      | (B, V) | float32, None | **written**: the law each token was drawn from, exact zeros where filtered |
    | seen      | (B, V) | bool, None | tokens of each text; needed for a repetition penalty |
    | recent    | (B, R) | int64, None | further tokens of each text, not yet in ``seen`` |
    | active    | (B)    | bool, None | rows to draw for; the others get token 0 |
    | verdicts  | (B)    | int32, None | **written**: 0 where there is a token, else why there is none |
    | returns   | (B)    | int64   | |

    Equivalent to ``argmax(log p + Gumbel noise)`` (the Gumbel-max draw), computed as an exponential race.

    With ``verdicts`` the call does not wait for the device and raises nothing for a row without a law, which gets token
    0; ``ops.law.raise_for(verdicts)`` raises it later.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or a row has no law; it names the row.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must have shape (B, V), got {tuple(logits.shape)}")
    batch, vocabulary = logits.shape
    check("logits", logits, logits.shape, logits)
    check_keys(keys, positions, batch, logits)
    check_active(active, batch, logits)
    check_verdicts(verdicts, batch, logits)
    if laws is not None:
        check("laws", laws, logits.shape, logits)
    recent = logits.new_empty(batch, 0, dtype=torch.int64) if recent is None else recent
    check_tokens("recent", recent, (batch, recent.shape[-1]), vocabulary, logits)
    check_seen(filters, seen, batch, vocabulary, logits)
    read = {"logits": logits, "keys": keys, "positions": positions, "seen": seen, "recent": recent, "active": active}
    check_written({"laws": laws, "verdicts": verdicts}, read)
    args = SampleTokensArgs(
        logits, filters, keys, positions, int(purpose), laws, seen, recent, active,
    )  # fmt: skip
    tokens, found = run("sample_tokens", backend, args)
    if verdicts is None:
        raise_for(found)
    else:
        verdicts.copy_(found)
    return tokens
