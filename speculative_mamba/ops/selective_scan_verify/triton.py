"""The Mamba-1 recurrence in Triton."""

import math

import torch

from ..replay import ReplayInputs
from ..triton_scan import scan


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
    inputs: ReplayInputs | None = None,
) -> torch.Tensor:
    groups = [tensor if tensor.ndim == 4 else tensor[:, :, None] for tensor in (B, C)]
    y = scan(
        x[..., None], dt, A, *groups, D, z, dt_bias, (0.0, math.inf), states, start_slot, write_slot, null_columns,
        keep_last, inputs,
    )  # fmt: skip
    return y[..., 0]
