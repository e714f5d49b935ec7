"""Depthwise causal convolution, with SiLU and gates or without, over a window of tokens, starting from any earlier
token."""

from typing import NamedTuple

import torch

from ..backend import run
from ..checks import (
    MAX_CONV_WIDTH,
    WEIGHT_DTYPES,
    check,
    check_activations,
    check_left_padding,
    check_slots,
    check_written,
)
from ..library import operator


class CausalConv1dVerifyArgs(NamedTuple):
    """The arguments of ``causal_conv1d_verify``, as every backend takes them."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    window: torch.Tensor
    start_slot: torch.Tensor
    write_slot: int
    input_gate: torch.Tensor | None
    output_gate: torch.Tensor | None
    silu: bool
    repeat: int
    block: int
    left_padding: torch.Tensor | None
    final_state_only: bool
    constant_weights: bool


@operator(writes=("window",), returns=lambda x, weight, **_: x.new_empty(*x.shape[:2], weight.shape[0]))
def causal_conv1d_verify(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    window: torch.Tensor,
    start_slot: torch.Tensor,
    write_slot: int = 0,
    *,
    input_gate: torch.Tensor | None = None,
    output_gate: torch.Tensor | None = None,
    silu: bool = True,
    repeat: int = 1,
    block: int | None = None,
    left_padding: torch.Tensor | None = None,
    final_state_only: bool = False,
    constant_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolves T tokens per row after the token in slot ``start_slot`` and keeps every token's input.

    | argument     | shape            | dtype                      | notes |
    |--------------|------------------|----------------------------|-------|
    | x            | (B, T, D/repeat) | activations                | channels contiguous |
    | weight       | (D, W)           | float32, bfloat16, float16 | any strides; W from 2 to 8 |
    | bias         | (D)              | float32 or None            | |
    | window       | (B, W-1+S, D)    | float32                    | **written** |
    | start_slot   | (B)              | int32                      | slot of the last committed token; -1: left out |
    | write_slot   | int              |                            | slot of the first token of the window |
    | input_gate   | as x             | as x, or None              | multiplies x, in float32, before it is convolved |
    | output_gate  | (B, T, D)        | as x, or None              | multiplies y |
    | silu         | bool             |                            | False: the convolution without activation |
    | repeat       | int              |                            | channels of y for each channel of x |
    | block        | int or None      |                            | channels of x that repeat together |
    | left_padding | (B)              | int32 or None              | that many leading inputs of a row count as 0 |
    | final_state_only | bool         |                            | prefill: keep the last W-1 inputs, as slot 0's |
    | constant_weights | bool         |                            | see ``ops``; of weight, bias |
    | returns      | (B, T, D)        | as x                       | silu(conv(x) + bias), gated |

    Row W-1+j of ``window`` holds the input of slot j; rows s+1 … s+W-1 are what precedes the token after slot s. The
    call reads those of ``start_slot``, writes rows W-1+write_slot …, and with ``write_slot`` 0 moves the history it
    read to rows 0 … W-2. Who owns the bookkeeping: the caller sets ``start_slot`` after acceptance, nothing else. Of a
    row with ``start_slot`` -1 nothing is read or written, and its y is 0.

    With ``repeat`` every ``block`` channels of x serve ``repeat`` times in a row, as the heads of grouped queries do:
    channel c reads channel ``c // (block · repeat) · block + c % block`` of x, as if x were
    ``x.view(B, T, -1, 1, block).expand(-1, -1, -1, repeat, -1).flatten(2)``; and of ``input_gate``
    likewise. ``window`` holds the inputs as they are convolved: gated and repeated.

    Equivalent to ``silu(torch.nn.functional.conv1d(cat(history, x), weight[:, None], bias, groups=D))`` per row.

    Raises:
        ValueError: a shape, dtype, stride, device or slot does not fit; ``repeat`` has no block, or block · repeat does
            not divide D.
    """
    if x.ndim != 3 or weight.ndim != 2 or window.ndim != 3:
        raise ValueError(f"x and window need 3 dimensions, weight 2; got {x.ndim}, {window.ndim}, {weight.ndim}")
    if repeat < 1 or (block is None and repeat > 1) or (block is not None and block < 1):
        raise ValueError(f"repeat needs a block, both at least 1, got repeat {repeat} and block {block}")
    block = 1 if block is None else block
    batch, channels = len(x), x.shape[2] * repeat
    width = weight.shape[1]
    slots = window.shape[1] - width + 1
    if not 2 <= width <= MAX_CONV_WIDTH:
        raise ValueError(f"weight must have 2 to {MAX_CONV_WIDTH} taps, got {width}")
    check_activations("x", x, backend)
    if x.shape[2] % block:
        raise ValueError(f"block {block} times repeat {repeat} does not divide the {channels} channels")
    if weight.shape[0] != channels or weight.dtype not in WEIGHT_DTYPES or weight.device != x.device:
        expected = f"({channels}, W) in float32, bfloat16 or float16 on {x.device}"
        raise ValueError(f"weight must be {expected}, got {tuple(weight.shape)} {weight.dtype} on {weight.device}")
    if bias is not None:
        check("bias", bias, (channels,), x)
    if input_gate is not None:
        check("input_gate", input_gate, x.shape, x, x.dtype)
    if output_gate is not None:
        check("output_gate", output_gate, (batch, x.shape[1], channels), x, x.dtype)
    check("window", window, (batch, window.shape[1], channels), x)
    check_slots(x, slots, start_slot, write_slot, final_state_only)
    check_left_padding(left_padding, batch, x)
    read = {
        "x": x, "weight": weight, "bias": bias, "start_slot": start_slot, "input_gate": input_gate,
        "output_gate": output_gate, "left_padding": left_padding,
    }  # fmt: skip
    check_written({"window": window}, read)
    args = CausalConv1dVerifyArgs(
        x, weight, bias, window, start_slot, write_slot, input_gate, output_gate, silu, repeat, block, left_padding,
        final_state_only, constant_weights,
    )  # fmt: skip
    return run("causal_conv1d_verify", backend, args)
