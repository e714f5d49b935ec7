"""Which draft tokens stand, and the token after them."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import (
    check,
    check_active,
    check_contiguous,
    check_num_draft_tokens,
    check_rng_keys,
    check_row_status,
    check_sampling,
    check_tokens,
    check_written,
)
from ..library import operator
from ..noise import Purpose
from ..sampling import raise_for
from ..sampling_tensors import SamplingTensors


class SpeculativeAcceptArgs(NamedTuple):
    """The arguments of ``speculative_accept``, as every backend takes them; and with K = 0 those of ``sample_tokens``,
    of which each has more:

    draft_tokens: (B, R) with R of at least K: the last K are tested, those before only count as text. None: R is 0.
    purpose: of the noise that tokens are drawn with. target_probs: (B, V), None: **written** with K = 0. A backend
    returns accepted, next token and row status, and may write the last into ``row_status``.
    """

    logits: torch.Tensor
    draft_tokens: torch.Tensor | None
    draft_probs: torch.Tensor | None
    sampling: SamplingTensors
    rng_keys: torch.Tensor
    positions: torch.Tensor
    coupled: bool
    prompt_mask: torch.Tensor | None
    output_counts: torch.Tensor | None
    active: torch.Tensor | None
    num_draft_tokens: torch.Tensor | None
    is_stop: torch.Tensor | None = None
    purpose: int = int(Purpose.TOKEN)
    target_probs: torch.Tensor | None = None
    row_status: torch.Tensor | None = None

    @property
    def text_tokens(self) -> torch.Tensor:
        """Draft tokens as a tensor in any case."""
        if self.draft_tokens is None:
            return self.logits.new_empty(len(self.logits), 0, dtype=torch.int64)
        return self.draft_tokens


def _results(logits: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch = logits.shape[0]
    return logits.new_empty(batch, dtype=torch.int32), logits.new_empty(batch, dtype=torch.int64)


@operator(writes=("row_status",), returns=_results)
def speculative_accept(
    logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    sampling: SamplingTensors,
    rng_keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    coupled: bool = False,
    prompt_mask: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    num_draft_tokens: torch.Tensor | None = None,
    is_stop: torch.Tensor | None = None,
    row_status: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filters, tests and resamples: each row keeps its draft tokens up to the first that the target refuses.

    | argument         | shape       | dtype   | notes |
    |------------------|-------------|---------|-------|
    | logits           | (B, K+1, V) | float32 | of the target, after each token of the window |
    | draft_tokens     | (B, K)      | int64   | K may be 0 |
    | draft_probs      | (B, K, V)   | float32, None | the rows the draft tokens come from; None: all certain |
    | sampling         | (B)         | SamplingTensors | of each row; greedy at temperature 0 |
    | rng_keys         | (B, 2)      | int64   | seed and stream of each row |
    | positions        | (B)         | int64   | of the first token that is chosen, counted from the start of its text |
    | coupled          | bool        |         | how draft tokens are tested |
    | prompt_mask      | (B, V)      | bool, None | tokens of each prompt; with penalties needed, like the next |
    | output_counts    | (B, V)      | int32, None | how often each token was generated, before the draft tokens |
    | active           | (B)         | bool, None | rows to decide; the others get 0 and 0 |
    | num_draft_tokens | (B)         | int32, None | at least 0 if active: as if it were the K of its row |
    | is_stop          | (B, V)      | bool, None | tokens that end each text |
    | row_status       | (B)         | int32, None | **written**: 0 where a row is decided, else why it cannot be |
    | returns          | accepted (B) int32, next token (B) int64 | | |

    Greedy rows and ``coupled``: the target chooses as ``sample_tokens`` would, position by position; a draft token
    stands if it is that choice (Gumbel coupling, arXiv 2408.07978). The choices do not depend on the draft.
    Otherwise (Leviathan et al. 2023, algorithm 1): token d stands if u·q(d) < p(d), u uniform in [0, 1); the token
    after the first refused one is drawn from the residual max(p - q, 0), the token after the last from p.
    Penalties at position j see the text and the draft tokens before it, which count as generated. What lies behind a
    refused token is never looked at, nor what lies behind a stop token of the draft: if that stands, 0 comes after it.

    With ``row_status`` the call does not wait for the device and raises nothing for logits and probabilities: of such a
    row ``accepted`` is the position, the next token is 0, and ``ops.sampling.raise_for(row_status, accepted)`` raises
    it later.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; on the CPU an id is outside the vocabulary; logits
            that matter are NaN or infinite; a row of draft_probs gives its own token no probability; a residual is
            empty or not finite. It names row and position of the window.
    """
    if logits.ndim != 3 or not logits.shape[1] or not logits.shape[2]:
        raise ValueError(f"logits must have shape (B, K+1, V), got {tuple(logits.shape)}")
    batch, tokens, vocabulary = logits.shape
    check("logits", logits, logits.shape, logits)
    check_tokens("draft_tokens", draft_tokens, (batch, tokens - 1), vocabulary, logits)
    check_sampling(sampling, prompt_mask, output_counts, batch, vocabulary, logits)
    check_rng_keys(rng_keys, positions, batch, logits)
    check_active(active, batch, logits)
    check_num_draft_tokens(num_draft_tokens, active, batch, logits)
    check_row_status(row_status, batch, logits)
    if draft_probs is not None:
        check("draft_probs", draft_probs, (batch, tokens - 1, vocabulary), logits)
    if is_stop is not None:
        check("is_stop", is_stop, (batch, vocabulary), logits, torch.bool)
        check_contiguous("is_stop", is_stop)
    read = {"logits": logits, "draft_tokens": draft_tokens, "draft_probs": draft_probs, "rng_keys": rng_keys}
    read |= {"positions": positions, "prompt_mask": prompt_mask, "output_counts": output_counts, "active": active}
    check_written({"row_status": row_status}, read | {"num_draft_tokens": num_draft_tokens, "is_stop": is_stop})
    args = SpeculativeAcceptArgs(
        logits, draft_tokens, draft_probs, sampling, rng_keys, positions, coupled, prompt_mask, output_counts, active,
        num_draft_tokens, is_stop, row_status=row_status,
    )  # fmt: skip
    accepted, next_token, found = run("speculative_accept", backend, args)
    if row_status is None:
        raise_for(found, accepted)
    elif found is not row_status:
        row_status.copy_(found)
    return accepted, next_token
