"""The specification in PyTorch, in the dtype of x: float32, or float64 to measure the kernels' error."""

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
    dt = F.softplus(dt + dt_bias)
    state = states[torch.arange(batch, device=x.device), start_slot.long()].clone()
    y = []
    for t in range(tokens):
        new = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        state = new if null_columns is None else torch.where((t < null_columns)[:, None, None], state, new)
        if not keep_last:
            states[:, write_slot + t] = state
        y.append((state * C[:, t, None, :]).sum(-1) + D * x[:, t])
    if keep_last:
        states[:, 0] = state
    out = torch.stack(y, 1)
    return out if z is None else out * F.silu(z)
