"""The specification in PyTorch, in the dtype of x: float32, in which 16 bits are computed too, or float64 to
measure the kernels' error. Every state is rounded to the dtype of ``states``. A may also be (H, N): one for every state
of a head's channels.

Token by token, because PyTorch rounds softplus, SiLU and sums by where a value lies in its tensor.
"""

import torch
import torch.nn.functional as F

from ..wide import is_narrow, widened
from . import SsdVerifyArgs


def ssd_verify(args: SsdVerifyArgs) -> torch.Tensor:
    x, dt, B, C, z = args.x, args.dt, args.B, args.C, args.z
    states, inputs, start_slot, write_slot = args.states, args.inputs, args.start_slot, args.write_slot
    if is_narrow(x):
        return ssd_verify(widened(args, "x", "dt", "B", "C", "z")).to(x.dtype)
    batch, tokens, heads = dt.shape
    skip = args.D if args.D.ndim == 2 else args.D[:, None]
    rate = args.A[:, None, :] if args.A.ndim == 2 else args.A[:, None, None]

    def next_state(state: torch.Tensor, x: torch.Tensor, step: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """The state (H, P, N) after a token, rounded to the dtype of ``states``."""
        decay = torch.exp(step[:, None, None] * rate)
        after = decay * state + (step[:, None] * _per_head(x, heads))[..., None] * _per_head(B, heads)[:, None]
        return torch.where(step[:, None, None] == 0, state, after.to(states.dtype).to(x.dtype))

    y = x.new_zeros(batch, tokens, heads, x.shape[3])
    for b in range(batch):
        if start_slot[b] < 0:
            continue
        state = states[b, 0 if inputs else start_slot[b]].to(x.dtype, copy=True)
        if inputs:
            for j in range(write_slot or int(start_slot[b]) + 1):
                state = next_state(state, inputs.x[b, j], inputs.dt[b, j], inputs.B[b, j])
            if write_slot == 0:
                states[b, 0] = state
        for t in range(tokens):
            step = F.softplus(dt[b, t] + args.dt_bias).clamp(*args.dt_limit)
            if args.left_padding is not None and t < args.left_padding[b]:
                step = torch.zeros_like(step)
            state = next_state(state, x[b, t], step, B[b, t])
            y[b, t] = (state * _per_head(C[b, t], heads)[:, None]).sum(-1) + skip * _per_head(x[b, t], heads)
            if z is not None:
                y[b, t] *= F.silu(z[b, t])
            slot = write_slot + t
            if inputs and not args.final_state_only:
                inputs.x[b, slot], inputs.dt[b, slot], inputs.B[b, slot] = x[b, t], step, B[b, t]
            elif not args.final_state_only:
                states[b, slot] = state
        if args.final_state_only:
            states[b, 0] = state
            if inputs:
                inputs.dt[b, 0] = 0
    return y


def _per_head(shared: torch.Tensor, heads: int) -> torch.Tensor:
    """(X, …) → (H, …): neighbouring heads share."""
    return shared.repeat_interleave(heads // len(shared), 0)
