"""The end of a round: which tokens become text, and where each row goes on."""

import math
from typing import NamedTuple

import torch

from ..backend import run
from ..checks import check, check_contiguous, check_tokens, check_written
from .rows import BatchState

__all__ = ["BatchState", "commit_tokens"]


class CommitTokensArgs(NamedTuple):
    """The arguments of ``commit_tokens``, as every backend takes them."""

    drafted: torch.Tensor
    accepted: torch.Tensor
    following: torch.Tensor
    verdicts: torch.Tensor
    limits: torch.Tensor
    is_stop: torch.Tensor
    rows: BatchState
    output_counts: torch.Tensor | None
    text: torch.Tensor | None


def commit_tokens(
    drafted: torch.Tensor,
    accepted: torch.Tensor,
    following: torch.Tensor,
    verdicts: torch.Tensor,
    limits: torch.Tensor,
    is_stop: torch.Tensor,
    rows: BatchState,
    *,
    output_counts: torch.Tensor | None = None,
    text: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Appends each row's accepted tokens and the next one to its text, and says where its next round starts.

    | argument  | shape    | dtype       | notes |
    |-----------|----------|-------------|-------|
    | drafted   | (B, K)   | int64       | K may be 0 |
    | accepted  | (B)      | int32       | how many of them stand, 0 … K |
    | following | (B)      | int64       | the token after those |
    | verdicts  | (B)      | int32       | not 0: the row is broken |
    | limits    | (B)      | int32       | drafted tokens that counted in ``speculative_accept`` |
    | is_stop   | (V)      | bool        | tokens that end a row |
    | rows      |          | BatchState   | **written** |
    | output_counts | (B, V) | int32, None | **written**: each committed token counts once more |
    | text      | (B, L)   | int64, None | **written**: committed tokens, from ``rows.positions`` on; none beyond L |
    | returns   | (B, K+5) | int64       | committed, ``accepted``, ``verdicts``, min(K, ``limits``), window; below |

    All are contiguous. The window of a row is its accepted tokens, then the following one. An active row commits them
    up to and including the first stop token, at most ``room`` + 1. It stays active if there was none and there is room
    for more; then ``slots[0]`` is the place in the window of the last token that was committed.
    A broken row commits nothing and ends. Of a row that is not active only ``slots`` is written, -1.

    The first four columns of a row that is not active are 0; so is what lies behind its window in the others.
    Nothing is read from a GPU, so there the values are the caller's duty; on the CPU they are checked.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or on the CPU a value.
    """
    if drafted.ndim != 2:
        raise ValueError(f"drafted must have shape (B, K), got {tuple(drafted.shape)}")
    if is_stop.ndim != 1 or not len(is_stop):
        raise ValueError(f"is_stop must have shape (V), got {tuple(is_stop.shape)}")
    (batch, lookahead), vocabulary = drafted.shape, len(is_stop)
    if rows.slots.ndim != 2 or len(rows.slots) <= lookahead:
        raise ValueError(
            f"rows.slots must have shape (S, {batch}) with S of at least {lookahead + 1}, got {tuple(rows.slots.shape)}"
        )
    if text is not None and text.ndim != 2:
        raise ValueError(f"text must have shape (B, L), got {tuple(text.shape)}")
    check_tokens("drafted", drafted, (batch, lookahead), vocabulary, drafted)
    check_tokens("following", following, (batch,), vocabulary, drafted)
    expected = {
        "accepted": (accepted, (batch,), torch.int32),
        "verdicts": (verdicts, (batch,), torch.int32),
        "limits": (limits, (batch,), torch.int32),
        "is_stop": (is_stop, (vocabulary,), torch.bool),
        "rows.last": (rows.last, (batch, 2), torch.int64),
        "rows.positions": (rows.positions, (batch,), torch.int64),
        "rows.room": (rows.room, (batch,), torch.int32),
        "rows.active": (rows.active, (batch,), torch.bool),
        "rows.slots": (rows.slots, (len(rows.slots), batch), torch.int32),
        "output_counts": (output_counts, (batch, vocabulary), torch.int32),
        "text": (text, (batch, 0 if text is None else text.shape[1]), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None:
            check(name, tensor, shape, drafted, dtype)
            check_contiguous(name, tensor)
    written = {f"rows.{name}": tensor for name, tensor in vars(rows).items()} | {
        "output_counts": output_counts,
        "text": text,
    }
    read = {"drafted": drafted, "accepted": accepted, "following": following, "verdicts": verdicts, "is_stop": is_stop}
    check_written(written, read)  # limits may be rows.room: a row's are read first
    if drafted.device.type == "cpu":
        _check_range("accepted", accepted, 0, lookahead)
        _check_range("rows.positions", rows.positions, 0)
        _check_range("rows.room", rows.room, -1)
    args = CommitTokensArgs(
        drafted, accepted, following, verdicts, limits, is_stop, rows, output_counts, text,
    )  # fmt: skip
    return run("commit_tokens", backend, args)


def _check_range(name: str, tensor: torch.Tensor, least: int, most: float = math.inf) -> None:
    values = tensor.tolist()
    if not all(least <= value <= most for value in values):
        raise ValueError(f"{name} must be from {least} to {most}, got {values}")
