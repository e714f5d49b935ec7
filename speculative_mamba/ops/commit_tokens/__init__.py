"""The end of a round: which tokens become text, and where each row goes on."""

import math
from typing import NamedTuple

import torch

from ..backend import run
from ..checks import check, check_contiguous, check_tokens, check_written
from ..library import operator
from .state import BatchState, FinishReason, Record

__all__ = ["BatchState", "FinishReason", "Record", "commit_tokens"]


class CommitTokensArgs(NamedTuple):
    """The arguments of ``commit_tokens``, as every backend takes them."""

    draft_tokens: torch.Tensor
    accepted: torch.Tensor
    next_token: torch.Tensor
    row_status: torch.Tensor
    draft_status: torch.Tensor | None
    num_draft_tokens: torch.Tensor | None
    is_stop: torch.Tensor
    state: BatchState
    output_counts: torch.Tensor | None
    text: torch.Tensor | None


def _result(draft_tokens: torch.Tensor, **_: object) -> torch.Tensor:
    batch, lookahead = draft_tokens.shape
    return draft_tokens.new_empty(batch, lookahead + 1 + int(Record.TOKENS))


@operator(writes=("state", "output_counts", "text"), returns=_result)
def commit_tokens(
    draft_tokens: torch.Tensor,
    accepted: torch.Tensor,
    next_token: torch.Tensor,
    row_status: torch.Tensor,
    draft_status: torch.Tensor | None,
    num_draft_tokens: torch.Tensor | None,
    is_stop: torch.Tensor,
    state: BatchState,
    *,
    output_counts: torch.Tensor | None = None,
    text: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Appends each row's accepted tokens and the next one to its text, and says where its next round starts.

    | argument         | shape    | dtype       | notes |
    |------------------|----------|-------------|-------|
    | draft_tokens     | (B, K)   | int64       | K may be 0 |
    | accepted         | (B)      | int32       | how many of them stand, 0 … K |
    | next_token       | (B)      | int64       | the token after those |
    | row_status       | (B)      | int32       | of ``speculative_accept``; not 0: the row is broken |
    | draft_status     | (K, B)   | int32, None | of ``sample_tokens`` at each step of the draft; None: all 0 |
    | num_draft_tokens | (B)      | int32, None | that of ``speculative_accept``; None: K |
    | is_stop          | (B, V)   | bool        | tokens that end each row |
    | state            |          | BatchState  | **written** |
    | output_counts    | (B, V)   | int32, None | **written**: each committed token counts once more |
    | text             | (B, L)   | int64, None | **written**: committed tokens from ``state.positions`` on, below L |
    | returns          | (B, K+7) | int64       | the columns of ``Record`` |

    All are contiguous. The window of a row is its accepted tokens, then the next one. An active row commits them up to
    and including the first stop token, at most ``remaining``. It stays active if there was none and more may come;
    then ``slots[0]`` is the place in the window of the last token that was committed.
    Draft tokens count up to ``num_draft_tokens`` and to the first stop token among them. A row is also broken if
    ``draft_status`` is not 0 for one that counts. A broken row commits nothing and ends. Of a row that is not active
    only ``slots`` is written, -1.

    Columns of the record, all 0 for a row that is not active:

    | column           | |
    |------------------|-|
    | NUM_COMMITTED    | tokens that became text |
    | ACCEPTED         | ``accepted`` |
    | ROW_STATUS       | ``row_status`` |
    | DRAFT_STATUS     | the largest ``draft_status`` of the tokens that count |
    | NUM_DRAFT_TOKENS | min(K, ``num_draft_tokens``) |
    | FINISH_REASON    | a ``FinishReason``: EOS after a stop token, LENGTH when none may come; NONE also if broken |
    | TOKENS …         | K + 1: the window, and 0 behind it |

    Nothing is read from a GPU, so there the values are the caller's duty; on the CPU they are checked.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or on the CPU a value.
    """
    if draft_tokens.ndim != 2:
        raise ValueError(f"draft_tokens must have shape (B, K), got {tuple(draft_tokens.shape)}")
    if is_stop.ndim != 2 or not is_stop.shape[1]:
        raise ValueError(f"is_stop must have shape (B, V), got {tuple(is_stop.shape)}")
    (batch, lookahead), vocabulary = draft_tokens.shape, is_stop.shape[1]
    if text is not None and text.ndim != 2:
        raise ValueError(f"text must have shape (B, L), got {tuple(text.shape)}")
    check_tokens("draft_tokens", draft_tokens, (batch, lookahead), vocabulary, draft_tokens)
    check_tokens("next_token", next_token, (batch,), vocabulary, draft_tokens)
    for name, tensor, shape, dtype in (
        ("accepted", accepted, (batch,), torch.int32),
        ("row_status", row_status, (batch,), torch.int32),
        ("draft_status", draft_status, (lookahead, batch), torch.int32),
        ("num_draft_tokens", num_draft_tokens, (batch,), torch.int32),
        ("is_stop", is_stop, (batch, vocabulary), torch.bool),
        ("state.last", state.last, (batch, 2), torch.int64),  # the others fit this one
        ("output_counts", output_counts, (batch, vocabulary), torch.int32),
        ("text", text, (batch, 0 if text is None else text.shape[1]), torch.int64),
    ):
        if tensor is not None:
            check(name, tensor, shape, draft_tokens, dtype)
            check_contiguous(name, tensor)
    if state.slots.shape[0] <= lookahead:
        raise ValueError(f"state.slots must have at least {lookahead + 1} steps, got {tuple(state.slots.shape)}")
    read = {
        "draft_tokens": draft_tokens, "accepted": accepted, "next_token": next_token, "row_status": row_status,
        "draft_status": draft_status, "num_draft_tokens": num_draft_tokens, "is_stop": is_stop,
    }  # fmt: skip
    written = {
        "state.last": state.last, "state.positions": state.positions, "state.remaining": state.remaining,
        "state.active": state.active, "state.slots": state.slots, "output_counts": output_counts, "text": text,
    }  # fmt: skip
    check_written(written, read)
    if draft_tokens.device.type == "cpu":
        _check_range("accepted", accepted, lookahead)
        _check_range("state.positions", state.positions)
        _check_range("state.remaining", state.remaining)
    args = CommitTokensArgs(
        draft_tokens, accepted, next_token, row_status, draft_status, num_draft_tokens, is_stop, state, output_counts,
        text,
    )  # fmt: skip
    return run("commit_tokens", backend, args)


def _check_range(name: str, tensor: torch.Tensor, limit: float = math.inf) -> None:
    values = tensor.tolist()
    if values and not (min(values) >= 0 and max(values) <= limit):
        raise ValueError(f"{name} must be from 0 to {limit}, got {values}")
