"""The specification in PyTorch, in the dtype of x: float32, in which 16 bits are computed too, or float64 to
measure the kernels' error. Every state is rounded to the dtype of ``states``.

Token by token, because PyTorch rounds softplus, SiLU and sums by where a value lies in its tensor.
"""

import torch
import torch.nn.functional as F

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
    if x.dtype in (torch.bfloat16, torch.float16):
        wide_x, dt, B, C, z = (None if part is None else part.float() for part in (x, dt, B, C, z))
        rest = dt_limit, inputs, null_columns, keep_last
        return ssd_verify(wide_x, dt, A, B, C, D, dt_bias, states, start_slot, write_slot, z, *rest).to(x.dtype)
    batch, tokens, heads = dt.shape
    skip = D if D.ndim == 2 else D[:, None]
    y = x.new_zeros(batch, tokens, heads, x.shape[3])
    for b in range(batch):
        if start_slot[b] < 0:
            continue
        state = states[b, 0 if inputs else start_slot[b]].to(x.dtype, copy=True)
        if inputs:
            for j in range(int(start_slot[b]) + 1):
                state = _next_state(state, inputs.x[b, j], inputs.dt[b, j], A, inputs.B[b, j], states.dtype)
            if write_slot == 0:
                states[b, 0] = state
        for t in range(tokens):
            step = F.softplus(dt[b, t] + dt_bias).clamp(*dt_limit)
            if null_columns is not None and t < null_columns[b]:
                step = torch.zeros_like(step)
            state = _next_state(state, x[b, t], step, A, B[b, t], states.dtype)
            y[b, t] = (state * _per_head(C[b, t], heads)[:, None]).sum(-1) + skip * _per_head(x[b, t], heads)
            if z is not None:
                y[b, t] *= F.silu(z[b, t])
            if inputs and not keep_last:
                slot = write_slot + t
                inputs.x[b, slot], inputs.dt[b, slot], inputs.B[b, slot] = x[b, t], step, B[b, t]
            elif not inputs and not keep_last:
                states[b, write_slot + t] = state
        if keep_last:
            states[b, 0] = state
            if inputs:
                inputs.dt[b, 0] = 0
    return y


def _per_head(shared: torch.Tensor, heads: int) -> torch.Tensor:
    """(X, …) → (H, …): neighbouring heads share."""
    return shared.repeat_interleave(heads // len(shared), 0)


def _next_state(
    state: torch.Tensor, x: torch.Tensor, step: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The state (H, P, N) after a token, rounded to ``dtype``."""
    heads = len(state)
    decay = torch.exp(step * A)[:, None, None]
    after = decay * state + (step[:, None] * _per_head(x, heads))[..., None] * _per_head(B, heads)[:, None]
    return torch.where(step[:, None, None] == 0, state, after.to(dtype).to(x.dtype))
