"""The Mamba-2 recurrence over a window of tokens, with the state after every token kept in a slot or to be replayed."""

import math
from typing import NamedTuple

import torch

from ..backend import run
from ..checks import (
    WEIGHT_DTYPES,
    check,
    check_activations,
    check_contiguous,
    check_follows,
    check_inputs,
    check_left_padding,
    check_slots,
    check_written,
)
from ..library import operator
from ..replay import ReplayBuffer, replay_tensors


class SsdVerifyArgs(NamedTuple):
    """The arguments of ``ssd_verify``, as every backend takes them."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    states: torch.Tensor
    start_slot: torch.Tensor
    write_slot: int
    z: torch.Tensor | None
    dt_limit: tuple[float, float]
    inputs: ReplayBuffer | None
    left_padding: torch.Tensor | None
    final_state_only: bool
    constant_weights: bool


@operator(writes=("states", "inputs"), returns=lambda x, **_: x.new_empty(x.shape))
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
    write_slot: int = 0,
    *,
    z: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    inputs: ReplayBuffer | None = None,
    left_padding: torch.Tensor | None = None,
    final_state_only: bool = False,
    constant_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Scans T tokens per row from the state in slot ``start_slot`` (Dao and Gu 2024, arXiv 2405.21060, section 7).

    | argument     | shape           | dtype         | notes |
    |--------------|-----------------|---------------|-------|
    | x            | (B, T, X, P)    | activations   | (X, P) contiguous; X divides H |
    | dt           | (B, T, H)       | as x          | heads contiguous; before bias, softplus and limits |
    | A, dt_bias   | (H)             | float32       | A negative |
    | B, C         | (B, T, G, N)    | as x          | (G, N) contiguous; G divides H and may differ between the two |
    | D            | (H) or (H, P)   | float32       | contiguous |
    | z            | (B, T, H, P)    | as x, None    | gate: y is multiplied by silu(z); (H, P) contiguous |
    | states       | (B, S, H, P, N) | any of three  | **written**; (H, P, N) contiguous; float32, bfloat16 or float16 |
    | start_slot   | (B)             | int32         | slot of the last committed state; -1: left out |
    | write_slot   | int             |               | slot of the state after the first token |
    | dt_limit     | two numbers     |               | smallest and largest Δ, both at least 0 |
    | inputs       | ReplayBuffer    | None          | **written**; with it states has one slot, see ``ReplayBuffer`` |
    | left_padding | (B)             | int32, None   | that many leading tokens of a row leave its state as it was |
    | final_state_only    | bool            |               | prefill: only the last state is written, to slot 0 |
    | constant_weights | bool        |               | see ``ops``; of A, D, dt_bias |
    | returns      | (B, T, H, P)    | as x          | |

    With Δ = softplus(dt + dt_bias), clamped to ``dt_limit``: state[p] ← exp(Δ A) state[p] + (Δ x[p]) B and
    y[p] = C·state[p] + D x[p], for every head; a token whose Δ is 0 leaves the state as it was. Head h uses head
    h X // H of x, and likewise for the groups of B and C.

    The state after token t goes to slot ``write_slot + t``, so going back to any token is choosing its slot. A row's
    start state is read before anything is written. With ``inputs`` slots are computed again instead of stored: the
    state is read and written once per call, and results are the same to the last bit. Who owns the bookkeeping: the
    caller sets ``start_slot`` after acceptance, nothing else. Of a row with ``start_slot`` -1 nothing is read or
    written, its inputs neither, and its y is 0.

    Arithmetic is float32. After every token the state is rounded (to nearest, ties to even) to the dtype of ``states``;
    that token's y and the next token use the rounded one. A float16 state beyond 65504 becomes infinite.

    T tokens in one call give the same bits as T calls of one token, whatever the dtype of ``states``.

    Raises:
        ValueError: a shape, dtype, stride, device, slot or limit does not fit.
    """
    if x.ndim != 4 or dt.ndim != 3 or B.ndim != 4 or C.ndim != 4 or states.ndim != 5:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, dt, B, C, states))
        raise ValueError(f"x needs 4 dimensions, dt 3, B 4, C 4, states 5, got {shapes}")
    batch, tokens, x_heads, head_size = x.shape
    heads, state_size = dt.shape[2], B.shape[3]
    check_activations("x", x, backend)
    check("dt", dt, (batch, tokens, heads), x, x.dtype)
    check("A", A, (heads,), x)
    check("B", B, (batch, tokens, B.shape[2], state_size), x, x.dtype)
    check("C", C, (batch, tokens, C.shape[2], state_size), x, x.dtype)
    check("D", D, (heads, head_size) if D.ndim == 2 else (heads,), x)
    check_contiguous("D", D)
    check("dt_bias", dt_bias, (heads,), x)
    slots = states.shape[1]
    kept = slots if inputs is None else 1
    check("states", states, (batch, kept, heads, head_size, state_size), x, WEIGHT_DTYPES)
    if inputs is not None:
        slots = check_inputs(inputs, {"x": x.shape[2:], "dt": (heads,), "B": B.shape[2:]}, x)
    if z is not None:
        check("z", z, (batch, tokens, heads, head_size), x, x.dtype)
        _check_packed("z", z, 2)
    for name, tensor, dims in (("x", x, 2), ("B", B, 2), ("C", C, 2), ("states", states, 3)):
        _check_packed(name, tensor, dims)
    for name, shared in (("heads of x", x_heads), ("groups of B", B.shape[2]), ("groups of C", C.shape[2])):
        if shared < 1 or heads % shared:
            raise ValueError(f"the number of {name} must divide the {heads} heads of dt, got {shared}")
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be two numbers from 0 up, the smaller first, got {tuple(dt_limit)}")
    check_slots(dt, slots, start_slot, write_slot, final_state_only)
    if inputs is not None:
        check_follows(start_slot, write_slot)
    check_left_padding(left_padding, batch, x)
    read = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "start_slot": start_slot}
    check_written({"states": states, **replay_tensors(inputs)}, read | {"left_padding": left_padding})
    args = SsdVerifyArgs(
        x, dt, A, B, C, D, dt_bias, states, start_slot, write_slot, z, dt_limit, inputs, left_padding, final_state_only,
        constant_weights,
    )  # fmt: skip
    return run("ssd_verify", backend, args)


def _check_packed(name: str, tensor: torch.Tensor, dims: int) -> None:
    """The last ``dims`` dimensions must lie without gaps."""
    if tensor.is_contiguous():
        return
    step = 1
    for size, stride in zip(tensor.shape[: -dims - 1 : -1], tensor.stride()[: -dims - 1 : -1], strict=True):
        if size > 1 and stride != step:
            raise ValueError(f"{name} must be contiguous in its last {dims} dimensions, got strides {tensor.stride()}")
        step *= size
