"""One token per row: ``speculative_accept`` without a draft token."""

import torch

from .backend import run
from .checks import (
    check,
    check_active,
    check_rng_keys,
    check_row_status,
    check_sampling,
    check_tokens,
    check_written,
)
from .library import operator
from .noise import Purpose
from .sampling import raise_for
from .sampling_tensors import SamplingTensors
from .speculative_accept import SpeculativeAcceptArgs


@operator(
    writes=("probs", "row_status"),
    returns=lambda logits, **_: logits.new_empty(logits.shape[0], dtype=torch.int64),
)
def sample_tokens(
    logits: torch.Tensor,
    sampling: SamplingTensors,
    rng_keys: torch.Tensor,
    positions: torch.Tensor,
    purpose: Purpose = Purpose.TOKEN,
    *,
    probs: torch.Tensor | None = None,
    draft_tokens: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    row_status: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Draws a token for every row, with noise that depends on seed, stream, position and purpose alone.

    | argument      | shape  | dtype   | notes |
    |---------------|--------|---------|-------|
    | logits        | (B, V) | float32 | |
    | sampling      | (B)    | SamplingTensors | bias, penalties, temperature, top-k, top-p, min-p of each row |
    | rng_keys      | (B, 2) | int64   | seed and stream of each row |
    | positions     | (B)    | int64   | of the token that is drawn, counted from the start of its text |
    | purpose       |        |         | numbers of different purposes are independent |
    | probs         | (B, V) | float32, None | **written**: what each token was drawn from, exact zeros where filtered |
    | draft_tokens  | (B, R) | int64, None | tokens of each text behind those that are counted |
    | prompt_mask   | (B, V) | bool, None | tokens of each prompt; with penalties needed, like the next |
    | output_counts | (B, V) | int32, None | how often each token was generated |
    | active        | (B)    | bool, None | rows to draw for; the others get token 0 |
    | row_status    | (B)    | int32, None | **written**: 0 where there is a token, else why there is none |
    | returns       | (B)    | int64   | |

    Equivalent to ``argmax(log p + Gumbel noise)``, computed as an exponential race.

    With ``row_status`` the call does not wait for the device and raises nothing for a row without a token, which gets
    token 0; ``ops.sampling.raise_for(row_status)`` raises it later.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, on the CPU an id is outside the vocabulary, or a row
            has no token; it names the row.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must have shape (B, V), got {tuple(logits.shape)}")
    batch, vocabulary = logits.shape
    check("logits", logits, logits.shape, logits)
    check_sampling(sampling, prompt_mask, output_counts, batch, vocabulary, logits)
    check_rng_keys(rng_keys, positions, batch, logits)
    check_active(active, batch, logits)
    check_row_status(row_status, batch, logits)
    if probs is not None:
        check("probs", probs, logits.shape, logits)
    if draft_tokens is not None:
        check_tokens("draft_tokens", draft_tokens, (batch, draft_tokens.shape[-1]), vocabulary, logits)
    read = {"logits": logits, "rng_keys": rng_keys, "positions": positions, "draft_tokens": draft_tokens}
    read |= {"prompt_mask": prompt_mask, "output_counts": output_counts, "active": active}
    check_written({"probs": probs, "row_status": row_status}, read)
    args = SpeculativeAcceptArgs(
        logits.unsqueeze(1), draft_tokens, None, sampling, rng_keys, positions, False, prompt_mask, output_counts,
        active, None, purpose=int(purpose), target_probs=probs, row_status=row_status,
    )  # fmt: skip
    _, tokens, found = run("speculative_accept", backend, args)
    if row_status is None:
        raise_for(found)
    elif found is not row_status:
        row_status.copy_(found)
    return tokens
