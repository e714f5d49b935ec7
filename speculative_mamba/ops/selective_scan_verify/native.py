"""Binding to csrc/cpu/selective_scan_verify.cpp and csrc/cuda/selective_scan_verify.cu."""

import torch

from ..backend import DTYPE_CODE, address, compiled
from ..recording import new_result
from ..replay import ReplayInputs


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
    inputs: ReplayInputs | None,
) -> torch.Tensor:
    batch, tokens, channels = x.shape
    y = new_result(x, batch, tokens, channels)
    z_address, z_strides = (0, (0, 0)) if z is None else (z.data_ptr(), z.stride()[:2])
    b_groups, c_groups = (tensor.shape[2] if tensor.ndim == 4 else 1 for tensor in (B, C))
    kept = (0, 0, 0, 0)
    if inputs is not None:
        kept = (inputs.dt.shape[1], inputs.x.data_ptr(), inputs.dt.data_ptr(), inputs.B.data_ptr())
    kernels, where = compiled(x)
    kernels.selective_scan(
        DTYPE_CODE[x.dtype], batch, tokens, channels, A.shape[1], b_groups, c_groups, x.data_ptr(),
        x.stride()[:2], dt.data_ptr(), dt.stride()[:2], A.data_ptr(), B.data_ptr(), B.stride()[:2], C.data_ptr(),
        C.stride()[:2], D.data_ptr(), z_address, z_strides, dt_bias.data_ptr(), states.data_ptr(), states.stride()[:2],
        DTYPE_CODE[states.dtype], start_slot.data_ptr(), address(null_columns), write_slot, keep_last, *kept,
        y.data_ptr(), where,
    )  # fmt: skip
    return y
