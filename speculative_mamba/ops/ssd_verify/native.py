"""Binding to csrc/cpu/ssd_verify.cpp and csrc/cuda/ssd_verify.cu."""

import torch

from ..backend import DTYPE_CODE, address, compiled
from ..recording import new_result
from ..replay import ReplayInputs


def ssd_verify(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int,
    z: torch.Tensor | None,
    dt_limit: tuple[float, float],
    inputs: ReplayInputs | None,
    null_columns: torch.Tensor | None,
    keep_last: bool,
) -> torch.Tensor:
    batch, tokens, heads = dt.shape
    x_heads, head_size = x.shape[2:]
    y = new_result(x, batch, tokens, heads, head_size)
    replay = (0, 0, 0, 0) if inputs is None else (
        inputs.dt.shape[1], inputs.x.data_ptr(), inputs.dt.data_ptr(), inputs.B.data_ptr()
    )  # fmt: skip
    kernels, where = compiled(x)
    kernels.ssd(
        DTYPE_CODE[x.dtype], batch, tokens, heads, head_size, B.shape[3], x_heads, B.shape[2], C.shape[2],
        x.data_ptr(), x.stride()[:2], dt.data_ptr(), dt.stride()[:2], A.data_ptr(), B.data_ptr(), B.stride()[:2],
        C.data_ptr(), C.stride()[:2], D.data_ptr(), D.ndim == 2, address(z), (0, 0) if z is None else z.stride()[:2],
        dt_bias.data_ptr(), dt_limit, states.data_ptr(), states.stride()[:2], DTYPE_CODE[states.dtype],
        start_slot.data_ptr(), address(null_columns), write_slot, keep_last, *replay, y.data_ptr(), where,
    )  # fmt: skip
    return y
