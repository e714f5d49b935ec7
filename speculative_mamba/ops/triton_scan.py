"""The recurrence of both Mambas in Triton: Mamba-1 is Mamba-2 with heads of one channel and an A for every state.

A program takes a block of channels of a row through all tokens, their states in registers: the state is read once, and
every slot written once. Several programs read the inputs to be replayed, so new ones are kept by a launch of its own.
"""

import torch
import triton
import triton.language as tl

from .ssd_verify import SsdVerifyArgs
from .triton_math import ALL, exp, launch, narrow, row_sums, silu, softplus, widen

STATES = 256  # of a program, four for each of 64 threads: 320 programs for a row of 5120 channels with 16 states
REGISTERS = 64  # of a thread of such a program at most; left alone, ptxas spills some to get by with 40
INPUTS = 1024  # of a program that keeps inputs


@triton.jit
def _step_size(dt, bias, dt_limit):
    step = tl.minimum(softplus(widen(dt) + bias), dt_limit[1], propagate_nan=ALL)
    return tl.maximum(step, dt_limit[0], propagate_nan=ALL)


@triton.jit
def _after(h, A, dt, x, B, exists, dtype: tl.constexpr):
    """The state (M, N) after a token, rounded to ``dtype``. dt = 0 leaves every bit alone, whatever x and B are."""
    fed = tl.fma(exp(dt[:, None] * A), h, (dt * x)[:, None] * B)
    return tl.where(exists & (dt != 0)[:, None], widen(narrow(fed, dtype)), h)


@triton.jit(do_not_specialize=["tokens", "write_slot", "final_state_only"])
def _scan(
    x, dt, A, B, C, D, z, dt_bias, dt_limit, states, y, start_slot, left_padding, inputs,
    tokens, heads, head_size, x_heads, b_groups, c_groups, write_slot, final_state_only,
    STATE_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    A_PER_STATE: tl.constexpr, D_PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """x, dt, B, C, z are (tensor, batch stride, token stride), states (tensor, batch stride, slot stride)."""
    channels = heads * head_size
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)[None, :]
    head = channel // head_size
    in_row = channel < channels
    exists = in_row[:, None] & (n < STATE_SIZE)
    # Where they lie in a token or a slot.
    x_at = head // (heads // x_heads) * head_size + channel % head_size
    b_at = (head // (heads // b_groups))[:, None] * STATE_SIZE + n
    c_at = (head // (heads // c_groups))[:, None] * STATE_SIZE + n
    h_at = channel[:, None] * STATE_SIZE + n

    rate = tl.load(A + h_at, exists, 0.0) if A_PER_STATE else tl.load(A + head, in_row, 0.0)[:, None]
    skip = tl.load(D + (channel if D_PER_CHANNEL else head), in_row, 0.0)
    bias = tl.load(dt_bias + head, in_row, 0.0)
    padding = 0 if left_padding is None else tl.load(left_padding + row)
    start = tl.load(start_slot + row).to(tl.int64)
    y += row * tokens * channels
    if start < 0:
        for _ in range(tokens):
            tl.store(y + channel, tl.zeros((BLOCK,), y.dtype.element_ty), in_row)
            y += channels
        return
    dtype: tl.constexpr = states[0].dtype.element_ty
    slot = states[0] + row * states[1]
    begin = slot + start * states[2] if inputs is None else slot
    h = widen(tl.load(begin + h_at, exists, 0.0))
    tl.debug_barrier()  # all threads have read what others may overwrite
    if inputs is not None:
        x_old, dt_old, b_old, slots = inputs
        x_old += row * slots * (x_heads * head_size)
        dt_old += row * slots * heads
        b_old += row * slots * (b_groups * STATE_SIZE)
        for _ in range(tl.where(write_slot == 0, start + 1, write_slot)):
            step, fed = tl.load(dt_old + head, in_row, 0.0), tl.load(x_old + x_at, in_row, 0.0)
            h = _after(h, rate, step, fed, tl.load(b_old + b_at, exists, 0.0), exists, dtype)
            x_old += x_heads * head_size
            dt_old += heads
            b_old += b_groups * STATE_SIZE
        if write_slot == 0 and final_state_only == 0:
            tl.store(slot + h_at, narrow(h, dtype), exists)

    x_row, dt_row = x[0] + row * x[1], dt[0] + row * dt[1]
    b_row, c_row = B[0] + row * B[1], C[0] + row * C[1]
    z_row = None if z is None else z[0] + row * z[1]
    slot += tl.cast(write_slot, tl.int64) * states[2]
    for t in range(tokens):
        fed = widen(tl.load(x_row + x_at, in_row, 0.0))
        step = _step_size(tl.load(dt_row + head, in_row, 0.0), bias, dt_limit)
        step = tl.where(t < padding, 0.0, step)
        h = _after(h, rate, step, fed, widen(tl.load(b_row + b_at, exists, 0.0)), exists, dtype)
        total = tl.fma(skip, fed, row_sums(h * widen(tl.load(c_row + c_at, exists, 0.0))))
        if z is not None:
            total *= silu(widen(tl.load(z_row + channel, in_row, 0.0)))
            z_row += z[2]
        tl.store(y + channel, narrow(total, y.dtype.element_ty), in_row)
        if inputs is None:
            if final_state_only == 0:
                tl.store(slot + h_at, narrow(h, dtype), exists)
            slot += states[2]
        x_row += x[2]
        dt_row += dt[2]
        b_row += B[2]
        c_row += C[2]
        y += channels
    if final_state_only != 0:
        tl.store(states[0] + row * states[1] + h_at, narrow(h, dtype), exists)


@triton.jit(do_not_specialize=["tokens", "write_slot"])
def _keep_inputs(
    x, dt, B, dt_bias, dt_limit, start_slot, left_padding, inputs, tokens, heads, x_size, b_size, write_slot,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Leaves a token as the input of its slot."""
    blocks = tl.cdiv(tl.maximum(x_size, tl.maximum(heads, b_size)), BLOCK)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    t = (tl.program_id(0) // blocks % tokens).to(tl.int64)
    row = (tl.program_id(0) // blocks // tokens).to(tl.int64)
    if tl.load(start_slot + row) < 0:
        return
    x_old, dt_old, b_old, slots = inputs
    slot = row * slots + write_slot + t
    step = _step_size(
        tl.load(dt[0] + row * dt[1] + t * dt[2] + i, i < heads), tl.load(dt_bias + i, i < heads), dt_limit
    )
    if left_padding is not None:
        step = tl.where(t < tl.load(left_padding + row), 0.0, step)
    tl.store(dt_old + slot * heads + i, step, i < heads)
    tl.store(x_old + slot * x_size + i, widen(tl.load(x[0] + row * x[1] + t * x[2] + i, i < x_size)), i < x_size)
    tl.store(b_old + slot * b_size + i, widen(tl.load(B[0] + row * B[1] + t * B[2] + i, i < b_size)), i < b_size)


def scan(args: SsdVerifyArgs) -> torch.Tensor:
    """``ssd_verify``, where A may also be (H, N): one for every state of a head's channels."""
    x, B, states, inputs = args.x, args.B, args.states, args.inputs
    batch, tokens, heads = args.dt.shape
    x_heads, head_size = x.shape[2:]
    state_size = states.shape[-1]
    y = x.new_empty(batch, tokens, heads, head_size)
    block_n = triton.next_power_of_2(state_size)
    block = min(max(1, STATES // block_n), triton.next_power_of_2(heads * head_size))
    shared = {
        "x": _strided(x), "dt": _strided(args.dt), "B": _strided(B), "dt_bias": args.dt_bias,
        "dt_limit": args.dt_limit, "start_slot": args.start_slot, "left_padding": args.left_padding,
        "write_slot": args.write_slot, "tokens": tokens, "heads": heads,
        "inputs": None if inputs is None else (inputs.x, inputs.dt, inputs.B, inputs.dt.shape[1]),
    }  # fmt: skip
    launch(
        _scan, batch * triton.cdiv(heads * head_size, block), y, 2, **shared, A=args.A, C=_strided(args.C), D=args.D,
        z=None if args.z is None else _strided(args.z), states=_strided(states), y=y, head_size=head_size,
        x_heads=x_heads, b_groups=B.shape[2], c_groups=args.C.shape[2], final_state_only=int(args.final_state_only),
        STATE_SIZE=state_size, BLOCK=block, BLOCK_N=block_n, A_PER_STATE=args.A.ndim == 2,
        D_PER_CHANNEL=args.D.ndim == 2, maxnreg=REGISTERS,
    )  # fmt: skip
    if inputs is not None and args.final_state_only:
        inputs.dt[:, 0].masked_fill_((args.start_slot >= 0)[:, None], 0)
    elif inputs is not None:
        x_size, b_size = x_heads * head_size, B.shape[2] * state_size
        programs = batch * tokens * triton.cdiv(max(x_size, heads, b_size), INPUTS)
        launch(_keep_inputs, programs, y, 4, **shared, x_size=x_size, b_size=b_size, BLOCK=INPUTS)
    return y


def _strided(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    return tensor, tensor.stride(0), tensor.stride(1)
