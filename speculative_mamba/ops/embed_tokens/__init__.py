"""Rows of the embedding."""

from typing import NamedTuple

import torch

from ..backend import resolve, run
from ..checks import WEIGHT_DTYPES, check, check_token_ids
from ..library import operator


class EmbedTokensArgs(NamedTuple):
    """The arguments of ``embed_tokens``, as every backend takes them."""

    tokens: torch.Tensor
    table: torch.Tensor
    out_dtype: torch.dtype


def _result(tokens: torch.Tensor, table: torch.Tensor, out_dtype: torch.dtype, **_: object) -> torch.Tensor:
    return table.new_empty(tokens.shape[0] * tokens.shape[1], table.shape[1], dtype=out_dtype)


@operator(returns=_result)
def embed_tokens(
    tokens: torch.Tensor, table: torch.Tensor, *, out_dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> torch.Tensor:
    """The table's row of each token, in another dtype.

    | argument  | shape    | dtype   | notes |
    |-----------|----------|---------|-------|
    | tokens    | (B, T)   | int64   | contiguous in its last dimension |
    | table     | (V, d)   | float32, bfloat16 or float16 | contiguous in its last dimension |
    | out_dtype |          | float32, bfloat16 or float16 | on backend ``cpu`` float32 |
    | returns   | (B·T, d) | out_dtype | |

    Equivalent to ``torch.nn.functional.embedding(tokens.flatten(), table).to(out_dtype)``. No argument is written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or on the CPU an id is not of the table.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape (B, T), got {tuple(tokens.shape)}")
    if table.ndim != 2:
        raise ValueError(f"table must be a matrix, got shape {tuple(table.shape)}")
    check("tokens", tokens, tokens.shape, table, torch.int64)
    check_token_ids("tokens", tokens, table.shape[0])
    check("table", table, table.shape, table, WEIGHT_DTYPES)
    allowed = (torch.float32,) if resolve(backend, table.device.type) == "cpu" else WEIGHT_DTYPES
    if out_dtype not in allowed:
        raise ValueError(f"out_dtype must be {' or '.join(map(str, allowed))}, got {out_dtype}")
    return run("embed_tokens", backend, EmbedTokensArgs(tokens, table, out_dtype))
