"""The Mamba-1 recurrence over a window of tokens, with the state after every token kept in a slot."""

import math
from typing import NamedTuple

import torch

from ..backend import run
from ..checks import (
    WEIGHT_DTYPES,
    check,
    check_activations,
    check_follows,
    check_inputs,
    check_left_padding,
    check_slots,
    check_written,
)
from ..library import operator
from ..replay import ReplayBuffer, replay_tensors
from ..ssd_verify import SsdVerifyArgs


class SelectiveScanVerifyArgs(NamedTuple):
    """The arguments of ``selective_scan_verify``, as every backend takes them."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    z: torch.Tensor | None
    dt_bias: torch.Tensor
    states: torch.Tensor
    start_slot: torch.Tensor
    write_slot: int
    inputs: ReplayBuffer | None
    left_padding: torch.Tensor | None
    final_state_only: bool
    constant_weights: bool

    def as_ssd(self) -> SsdVerifyArgs:
        """The same for ``ssd_verify``: heads of one channel, and an A for every state."""
        B, C = (tensor if tensor.ndim == 4 else tensor[:, :, None] for tensor in (self.B, self.C))
        z = None if self.z is None else self.z[..., None]
        inputs = self.inputs and ReplayBuffer(self.inputs.x[..., None], self.inputs.dt, self.inputs.B)
        return SsdVerifyArgs(
            self.x[..., None], self.dt, self.A, B, C, self.D, self.dt_bias, self.states[:, :, :, None],
            self.start_slot, self.write_slot, z, (0.0, math.inf), inputs, self.left_padding, self.final_state_only,
            self.constant_weights,
        )  # fmt: skip


@operator(writes=("states", "inputs"), returns=lambda x, **_: x.new_empty(x.shape))
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
    write_slot: int = 0,
    *,
    inputs: ReplayBuffer | None = None,
    left_padding: torch.Tensor | None = None,
    final_state_only: bool = False,
    constant_weights: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Scans T tokens per row from the state in slot ``start_slot`` (Gu and Dao 2023, arXiv 2312.00752, algorithm 2).

    | argument     | shape        | dtype         | notes |
    |--------------|--------------|---------------|-------|
    | x, dt        | (B, T, D)    | activations   | channels contiguous; dt before bias and softplus |
    | A            | (D, N)       | float32       | negative, contiguous |
    | B, C         | (B, T, G, N) | as x          | (G, N) contiguous; (B, T, N) means G = 1 |
    | D, dt_bias   | (D)          | float32       | |
    | z            | (B, T, D)    | as x, None    | gate: y is multiplied by silu(z) |
    | states       | (B, S, D, N) | any of three  | **written**; (D, N) contiguous; float32, bfloat16 or float16 |
    | start_slot   | (B)          | int32         | slot of the last committed state; -1: left out |
    | write_slot   | int          |               | slot of the state after the first token |
    | inputs       | S slots      | float32, None | **written**; then states is (B, 1, D, N), the one kept state |
    | left_padding | (B)          | int32, None   | that many leading tokens of a row leave its state as it was |
    | final_state_only    | bool         |               | prefill: only the last state is written, to slot 0 |
    | constant_weights | bool     |               | see ``ops``; of A, D, dt_bias |
    | returns      | (B, T, D)    | as x          | |

    With Δ = softplus(dt + dt_bias): state ← exp(Δ A) state + Δ x B, y = C·state + D x. The state after token t goes to
    slot ``write_slot + t``, so going back to any token is choosing its slot. A row's start state is read before
    anything is written. Who owns the bookkeeping: the caller sets ``start_slot`` after acceptance, nothing else. Of a
    row with ``start_slot`` -1 nothing is read or written, its inputs neither, and its y is 0.

    B and C may have different numbers of groups G, each a divisor of D: channel d uses group d·G // D. A token whose Δ
    is 0 leaves the state exactly as it was; left padding have Δ = 0.

    With ``inputs`` (see ``ReplayBuffer``) a slot's state is that after the inputs up to the slot, which are fed again:
    with ``write_slot`` 0 inputs 0 … ``start_slot``, and the state reached replaces the kept one; with ``write_slot``
    w > 0 every row that is not left out must start from slot w-1. The T tokens' x, Δ and B become inputs
    ``write_slot`` …, those of left padding with Δ = 0. With ``final_state_only`` the kept state becomes the last one,
    input 0 gets Δ = 0, and no other input is written. y and states have the same bits as with a state per slot.

    Arithmetic is float32. After every token the state is rounded (to nearest, ties to even) to the dtype of ``states``;
    that token's y and the next token use the rounded one. A float16 state beyond 65504 becomes infinite.

    T tokens in one call give the same bits as T calls of one token, whatever the dtype of ``states``.

    Raises:
        ValueError: a shape, dtype, stride, device, number of groups or slot does not fit.
    """
    if x.ndim != 3 or A.ndim != 2 or states.ndim != 4:
        raise ValueError(
            f"x needs 3 dimensions, A 2, states 4, got {tuple(x.shape)}, {tuple(A.shape)}, {tuple(states.shape)}"
        )
    batch, _, channels = x.shape
    state_size, slots = A.shape[1], states.shape[1]
    check_activations("x", x, backend)
    check("dt", dt, x.shape, x, x.dtype)
    check("A", A, (channels, state_size), x)
    _check_groups("B", B, x, state_size)
    _check_groups("C", C, x, state_size)
    check("D", D, (channels,), x)
    check("dt_bias", dt_bias, (channels,), x)
    check("states", states, (batch, slots if inputs is None else 1, channels, state_size), x, WEIGHT_DTYPES)
    if z is not None:
        check("z", z, x.shape, x, x.dtype)
    if not A.is_contiguous() or states.stride(2) != state_size:
        raise ValueError("A must be contiguous, and states in its last two dimensions")
    if inputs is not None:
        groups = B.shape[2] if B.ndim == 4 else 1
        slots = check_inputs(inputs, {"x": (channels,), "dt": (channels,), "B": (groups, state_size)}, x)
    check_slots(x, slots, start_slot, write_slot, final_state_only)
    if inputs is not None:
        check_follows(start_slot, write_slot)
    check_left_padding(left_padding, batch, x)
    read = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "start_slot": start_slot}
    check_written({"states": states, **replay_tensors(inputs)}, read | {"left_padding": left_padding})
    args = SelectiveScanVerifyArgs(
        x, dt, A, B, C, D, z, dt_bias, states, start_slot, write_slot, inputs, left_padding, final_state_only,
        constant_weights,
    )  # fmt: skip
    return run("selective_scan_verify", backend, args)


def _check_groups(name: str, tensor: torch.Tensor, x: torch.Tensor, state_size: int) -> None:
    batch, tokens, channels = x.shape
    groups = tensor.shape[2:-1] if tensor.ndim == 4 else ()
    check(name, tensor, (batch, tokens, *groups, state_size), x, x.dtype)
    if groups and (groups[0] == 0 or channels % groups[0]):
        raise ValueError(f"{name} has {groups[0]} groups, which do not divide {channels} channels")
    if groups and groups[0] > 1 and tensor.stride(2) != state_size:
        raise ValueError(f"{name} must be contiguous in its last two dimensions, got strides {tensor.stride()}")
