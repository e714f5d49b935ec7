"""The convolution in Triton: a program takes a block of channels of a row through all tokens, the last inputs in
registers."""

import torch
import triton
import triton.language as tl

from ..triton_math import launch, narrow, widen
from ..triton_math import silu as silu_of
from . import CausalConv1dVerifyArgs

CHANNELS = 128  # of a program


@triton.jit(do_not_specialize=["tokens", "write_slot", "final_state_only"])
def _convolve(
    x, weight, bias, window, y, start_slot, input_gate, output_gate, left_padding, tokens, channels, repeat, block,
    write_slot, final_state_only, WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, window, gates: (tensor, batch stride, token or row stride); weight: (tensor, channel stride, tap stride)."""
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    source = channel // (block * repeat) * block + channel % block
    exists = channel < channels
    start = tl.load(start_slot + row).to(tl.int64)
    y += row * tokens * channels
    if start < 0:
        for _ in range(tokens):
            tl.store(y + channel, tl.zeros((BLOCK,), y.dtype.element_ty), exists)
            y += channels
        return
    padding = 0 if left_padding is None else tl.load(left_padding + row)
    first = tl.zeros((BLOCK,), tl.float32) if bias is None else tl.load(bias + channel, exists, 0.0)
    window_row, row_stride = window[0] + row * window[1], tl.cast(window[2], tl.int64)

    taps, inputs = (), ()
    for k in tl.static_range(WIDTH):
        taps += (widen(tl.load(weight[0] + channel.to(tl.int64) * weight[1] + k * weight[2], exists, 0.0)),)
    for k in tl.static_range(WIDTH - 1):
        inputs += (tl.load(window_row + (start + 1 + k) * row_stride + channel, exists, 0.0),)
    tl.debug_barrier()  # all threads have read what others may overwrite
    if write_slot == 0 and final_state_only == 0:
        for k in tl.static_range(WIDTH - 1):
            tl.store(window_row + k * row_stride + channel, inputs[k], exists)
    x_row = x[0] + row * x[1]
    kept = window_row + (write_slot + (WIDTH - 1)) * row_stride
    for t in range(tokens):
        current = widen(tl.load(x_row + source, exists, 0.0))
        if input_gate is not None:
            current *= widen(tl.load(input_gate[0] + row * input_gate[1] + t * input_gate[2] + source, exists, 0.0))
        current = tl.where(t < padding, 0.0, current)
        if final_state_only == 0:
            tl.store(kept + channel, current, exists)
        inputs += (current,)
        total = first
        for k in tl.static_range(WIDTH):
            total = tl.fma(inputs[k], taps[k], total)
        inputs = inputs[1:]
        total = silu_of(total) if SILU else total
        if output_gate is not None:
            total *= widen(tl.load(output_gate[0] + row * output_gate[1] + t * output_gate[2] + channel, exists, 0.0))
        tl.store(y + channel, narrow(total, y.dtype.element_ty), exists)
        x_row += x[2]
        y += channels
        kept += row_stride
    if final_state_only != 0:
        for k in tl.static_range(WIDTH - 1):
            tl.store(window_row + (1 + k) * row_stride + channel, inputs[k], exists)


def causal_conv1d_verify(args: CausalConv1dVerifyArgs) -> torch.Tensor:
    x, weight, window = args.x, args.weight, args.window
    batch, tokens, _ = x.shape
    channels, width = weight.shape
    y = x.new_empty(batch, tokens, channels)
    gates = [gate if gate is None else (gate, *gate.stride()[:2]) for gate in (args.input_gate, args.output_gate)]
    launch(
        _convolve, batch * triton.cdiv(channels, CHANNELS), y, 4, x=(x, x.stride(0), x.stride(1)),
        weight=(weight, *weight.stride()), bias=args.bias, window=(window, window.stride(0), window.stride(1)), y=y,
        start_slot=args.start_slot, input_gate=gates[0], output_gate=gates[1],
        left_padding=args.left_padding, tokens=tokens, channels=channels,
        repeat=args.repeat, block=args.block, write_slot=args.write_slot, final_state_only=int(args.final_state_only),
        WIDTH=width, SILU=args.silu, BLOCK=CHANNELS,
    )  # fmt: skip
    return y
