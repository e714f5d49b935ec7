"""The Mamba-2 recurrence in Triton."""

import torch

from ..replay import ReplayInputs
from ..triton_scan import scan


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
    return scan(
        x, dt, A, B, C, D, z, dt_bias, dt_limit, states, start_slot, write_slot, null_columns, keep_last, inputs
    )  # fmt: skip
