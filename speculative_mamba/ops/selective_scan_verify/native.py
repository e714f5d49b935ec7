"""Binding to csrc/cpu/selective_scan_verify.cpp."""

import torch

from ..backend import DTYPE_CODE, extension
from ..recording import new_result


def selective_scan_verify(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int,
    null_columns: torch.Tensor | None,
    keep_last: bool,
) -> torch.Tensor:
    batch, tokens, channels = x.shape
    y = new_result(batch, tokens, channels)
    z_address, z_strides = (0, (0, 0)) if z is None else (z.data_ptr(), z.stride()[:2])
    extension()[0].selective_scan(
        batch, tokens, channels, A.shape[1], x.data_ptr(), x.stride()[:2], dt.data_ptr(), dt.stride()[:2],
        A.data_ptr(), B.data_ptr(), B.stride()[:2], C.data_ptr(), C.stride()[:2], D.data_ptr(), z_address, z_strides,
        dt_bias.data_ptr(), states.data_ptr(), states.stride()[:2], DTYPE_CODE[states.dtype], start_slot.data_ptr(),
        0 if null_columns is None else null_columns.data_ptr(), write_slot, keep_last, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y
