"""The specification in PyTorch, in the dtype of x: float32, in which 16 bits are computed too, or float64 to
measure the kernels' error. Every state is rounded to the dtype of ``states``.

Token by token, because PyTorch rounds softplus, SiLU and sums by where a value lies in its tensor.
"""

import torch
import torch.nn.functional as F

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
    inputs: ReplayInputs | None = None,
) -> torch.Tensor:
    if x.dtype in (torch.bfloat16, torch.float16):
        wide_x, dt, B, C, z = (None if part is None else part.float() for part in (x, dt, B, C, z))
        rest = dt_bias, states, start_slot, write_slot, null_columns, keep_last, inputs
        return selective_scan_verify(wide_x, dt, A, B, C, D, z, *rest).to(x.dtype)
    batch, tokens, channels = x.shape

    def of_channels(groups: torch.Tensor) -> torch.Tensor:
        """(G, N) or (N) → (D, N)"""
        groups = groups.reshape(-1, A.shape[1])
        return groups.repeat_interleave(channels // len(groups), 0)

    def following(state: torch.Tensor, x: torch.Tensor, step: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        fed = torch.exp(step[:, None] * A) * state + (step * x)[:, None] * of_channels(B)
        return torch.where(step[:, None] != 0, fed.to(states.dtype).to(x.dtype), state)

    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for b in range(batch):
        if start_slot[b] < 0:
            continue
        state = states[b, start_slot[b] if inputs is None else 0].to(x.dtype, copy=True)
        if inputs is not None:
            for i in range(write_slot or int(start_slot[b]) + 1):
                state = following(state, inputs.x[b, i], inputs.dt[b, i], inputs.B[b, i])
            if write_slot == 0 and not keep_last:
                states[b, 0] = state
        for t in range(tokens):
            step = F.softplus(dt[b, t] + dt_bias)
            if null_columns is not None and t < null_columns[b]:
                step = torch.zeros_like(step)
            state = following(state, x[b, t], step, B[b, t])
            if not keep_last and inputs is None:
                states[b, write_slot + t] = state
            elif not keep_last:
                kept = b, write_slot + t
                inputs.x[kept], inputs.dt[kept] = x[b, t], step
                inputs.B[kept] = B[b, t].reshape_as(inputs.B[kept])
            y[b, t] = (state * of_channels(C[b, t])).sum(-1) + D * x[b, t]
            if z is not None:
                y[b, t] *= F.silu(z[b, t])
        if keep_last:
            states[b, 0] = state
            if inputs is not None:
                inputs.dt[b, 0] = 0
    return y
