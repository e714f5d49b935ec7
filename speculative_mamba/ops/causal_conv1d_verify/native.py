"""Binding to csrc/cpu/causal_conv1d_verify.cpp."""

import torch

from ..backend import DTYPE_CODE, extension
from ..recording import new_result


def causal_conv1d_verify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int,
    null_columns: torch.Tensor | None,
    keep_last: bool,
) -> torch.Tensor:
    batch, tokens, channels = x.shape
    y = new_result(batch, tokens, channels)
    extension()[0].causal_conv1d(
        batch, tokens, channels, weight.shape[1], x.data_ptr(), x.stride()[:2], weight.data_ptr(), weight.stride(),
        DTYPE_CODE[weight.dtype], 0 if bias is None else bias.data_ptr(), window.data_ptr(), window.stride()[:2],
        start_slot.data_ptr(), 0 if null_columns is None else null_columns.data_ptr(), write_slot, keep_last,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
