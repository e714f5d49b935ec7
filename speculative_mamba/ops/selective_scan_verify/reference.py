"""The specification in PyTorch, in the dtype of x: float32, or float64 to measure the kernels' error. Every state is
rounded to the dtype of ``states``.

Token by token, because PyTorch rounds softplus, SiLU and sums by where a value lies in its tensor.
"""

import torch
import torch.nn.functional as F


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
    batch, tokens, _ = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for b in range(batch):
        state = states[b, start_slot[b]].to(x.dtype, copy=True)
        for t in range(tokens):
            step = F.softplus(dt[b, t] + dt_bias)
            if null_columns is None or t >= null_columns[b]:
                state = torch.exp(step[:, None] * A) * state + (step * x[b, t])[:, None] * B[b, t]
                state = state.to(states.dtype).to(x.dtype)
            if not keep_last:
                states[b, write_slot + t] = state
            y[b, t] = (state * C[b, t]).sum(-1) + D * x[b, t]
            if z is not None:
                y[b, t] *= F.silu(z[b, t])
        if keep_last:
            states[b, 0] = state
    return y
