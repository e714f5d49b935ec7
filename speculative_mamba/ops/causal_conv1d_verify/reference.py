"""The specification in PyTorch. One tap at a time, so that a token's value does not depend on T."""

import torch
import torch.nn.functional as F


def causal_conv1d_verify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int,
    null_columns: torch.Tensor | None,
    keep_last: bool,
    silu: bool = True,
    repeat: int = 1,
    block: int = 1,
) -> torch.Tensor:
    if x.dtype in (torch.bfloat16, torch.float16):
        rest = weight, bias, window, start_slot, write_slot, null_columns, keep_last, silu, repeat, block
        return causal_conv1d_verify(x.float(), *rest).to(x.dtype)
    batch, tokens, _ = x.shape
    channels, width = weight.shape
    x = x.unflatten(2, (-1, 1, block)).expand(-1, -1, -1, repeat, -1).flatten(2)
    weight = weight.to(x.dtype)
    columns = torch.arange(tokens, dtype=torch.int64, device=x.device)
    if null_columns is not None:
        x = x.masked_fill((columns < null_columns[:, None])[..., None], 0)
    rows = torch.arange(batch, dtype=torch.int64, device=x.device)[:, None]
    history = window[rows, start_slot[:, None].long() + 1 + torch.arange(width - 1, dtype=torch.int64, device=x.device)]
    inputs = torch.cat([history, x], 1)
    taken = (start_slot >= 0)[:, None, None]

    def write(first: int, inputs: torch.Tensor) -> None:
        into = window[:, first : first + inputs.shape[1]]
        into.copy_(torch.where(taken, inputs, into))

    if keep_last:
        write(1, inputs[:, tokens:])
    else:
        if write_slot == 0:
            write(0, history)
        write(width - 1 + write_slot, x)
    y = torch.zeros(channels, dtype=x.dtype, device=x.device) if bias is None else bias
    for k in range(width):
        y = y + inputs[:, k : k + tokens] * weight[:, k]
    y = y.masked_fill(~taken, 0)
    if not silu or not batch:
        return y
    # PyTorch rounds SiLU by where a value lies in its tensor, so every token goes through it alone.
    return torch.stack([torch.stack([F.silu(token) for token in row]) for row in y])
