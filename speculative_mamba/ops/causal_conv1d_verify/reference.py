"""The specification in PyTorch. One tap at a time, so that a token's value does not depend on T."""

import torch
import torch.nn.functional as F

from ..wide import is_narrow, widened
from . import CausalConv1dVerifyArgs


def causal_conv1d_verify(args: CausalConv1dVerifyArgs) -> torch.Tensor:
    x, window, start_slot, left_padding = args.x, args.window, args.start_slot, args.left_padding
    if is_narrow(x):
        return causal_conv1d_verify(widened(args, "x", "input_gate", "output_gate")).to(x.dtype)
    batch, tokens, _ = x.shape
    channels, width = args.weight.shape
    x = x if args.input_gate is None else x * args.input_gate
    x = x.unflatten(2, (-1, 1, args.block)).expand(-1, -1, -1, args.repeat, -1).flatten(2)
    weight = args.weight.to(x.dtype)
    columns = torch.arange(tokens, dtype=torch.int64, device=x.device)
    if left_padding is not None:
        x = x.masked_fill((columns < left_padding[:, None])[..., None], 0)
    rows = torch.arange(batch, dtype=torch.int64, device=x.device)[:, None]
    history = window[rows, start_slot[:, None].long() + 1 + torch.arange(width - 1, dtype=torch.int64, device=x.device)]
    inputs = torch.cat([history, x], 1)
    taken = (start_slot >= 0)[:, None, None]

    def write(first: int, inputs: torch.Tensor) -> None:
        into = window[:, first : first + inputs.shape[1]]
        into.copy_(torch.where(taken, inputs, into))

    if args.final_state_only:
        write(1, inputs[:, tokens:])
    else:
        if args.write_slot == 0:
            write(0, history)
        write(width - 1 + args.write_slot, x)
    y = torch.zeros(channels, dtype=x.dtype, device=x.device) if args.bias is None else args.bias
    for k in range(width):
        y = y + inputs[:, k : k + tokens] * weight[:, k]
    if args.silu and batch:
        # PyTorch rounds SiLU by where a value lies in its tensor, so every token goes through it alone.
        y = torch.stack([torch.stack([F.silu(token) for token in row]) for row in y])
    y = y if args.output_gate is None else y * args.output_gate
    return y.masked_fill(~taken, 0)
