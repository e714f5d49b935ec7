"""The ops of a Mamba layer that carry a state: every set starts from the slot of a window's last token, as after full
acceptance, and reads and writes slots in place."""

from abc import abstractmethod
from collections.abc import Callable

import torch

from speculative_mamba.ops import causal_conv1d_verify, selective_scan_verify, ssd_verify
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.testing.tolerance import assert_bitwise_equal

from .updates import conv_update, optional, scan_update
from .work import WindowWork, activations, assert_near, nbytes, outer_rows

MODES = ("snapshots", "replay")


def slots(device: torch.device, batch: int, slot: int) -> torch.Tensor:
    return torch.full((batch,), slot, dtype=torch.int32, device=device)


class Conv(WindowWork):
    """causal_conv1d_verify."""

    def __init__(self, channels: int, width: int, batch: int, tokens: int, device: torch.device) -> None:
        self.tokens = tokens
        self.x = activations(device, batch, tokens, channels)
        self.weight = activations(device, width, channels).t()
        self.bias = torch.randn(channels, device=device)
        self.window = torch.randn(batch, width - 1 + tokens, channels, device=device)
        self.start, self.zero = slots(device, batch, tokens - 1), slots(device, batch, 0)
        self.single = self.window[:, tokens - 1 :].clone()  # the same history, in a window of one slot
        history = nbytes(self.window[:, : width - 1])
        self.moved = 2 * self.x.nbytes + nbytes(self.weight, self.bias, self.window) + history

    def _conv(self, x: torch.Tensor, window: torch.Tensor, start: torch.Tensor, backend: str) -> torch.Tensor:
        return causal_conv1d_verify(x, self.weight, self.bias, window, start, backend=backend)

    def run(self, backend: str) -> torch.Tensor:
        return self._conv(self.x, self.window, self.start, backend)

    def one_by_one(self, backend: str) -> list[torch.Tensor]:
        return [self._conv(x, self.single, self.zero, backend) for x in self.x.split(1, 1)]

    def check(self, backend: str) -> None:
        rows = outer_rows(len(self.x))
        expected = self._conv(self.x[rows], self.window[rows], self.start[rows], "reference")
        windows = [self.run(backend) for _ in range(2)]  # the second starts from what the first has left
        assert_near(windows[0][rows], expected, "y")
        for y in windows:
            assert_bitwise_equal(y, torch.cat(self.one_by_one(backend), 1), "y, against one token at a time")

    def baselines(self) -> dict[str, Callable[[], object]]:
        tokens, weight = self.x.unbind(1), self.weight.float()
        baselines = {"torch": lambda: [conv_update(self.single, x, weight, self.bias) for x in tokens]}
        if update := optional("causal_conv1d", "causal_conv1d_update"):
            state, bias = self.single.transpose(1, 2).to(self.x.dtype).contiguous(), self.bias.to(self.x.dtype)
            packed = self.weight.contiguous()
            baselines["mamba_ssm"] = lambda: [update(x, state, packed, bias, "silu") for x in tokens]
        return baselines


class Recurrence(WindowWork):
    """A scan in one of the ways to go back: a state per slot, or one state and the inputs since, all of which are fed
    again. One by one there is a single slot, read and written in place."""

    op: Callable[..., torch.Tensor]
    window: dict[str, torch.Tensor]  # what has tokens
    parameters: tuple[torch.Tensor, ...]

    def __init__(self, state: tuple[int, ...], mode: str, dtype: torch.dtype, kept: ReplayBuffer) -> None:
        """kept: inputs of as many slots as there are tokens."""
        batch, self.tokens = kept.x.shape[:2]
        device = kept.x.device
        states = batch, 1 if mode == "replay" else self.tokens, *state
        self.states = torch.randn(states, device=device).to(dtype)
        self.inputs = kept if mode == "replay" else None
        self.single = torch.empty(batch, 1, *state, dtype=dtype, device=device).copy_(self.states[:, -1:])
        self.start, self.zero = slots(device, batch, self.tokens - 1), slots(device, batch, 0)
        self.launches = 1 if self.inputs is None else 2
        self.moved = self.single.nbytes + self.states.nbytes + nbytes(*self.window.values(), *self.parameters)
        self.moved += self.window["x"].nbytes + (2 * nbytes(*vars(kept).values()) if self.inputs else 0)

    def scan(
        self,
        window: dict[str, torch.Tensor],
        states: torch.Tensor,
        start: torch.Tensor,
        inputs: ReplayBuffer | None,
        backend: str,
    ) -> torch.Tensor:
        A, D, dt_bias = self.parameters
        return self.op(
            **window, A=A, D=D, dt_bias=dt_bias, states=states, start_slot=start, inputs=inputs, backend=backend
        )

    @abstractmethod
    def each_token(self) -> list[dict[str, torch.Tensor]]:
        """The arguments of ``scan_update``, by token."""

    def run(self, backend: str) -> torch.Tensor:
        return self.scan(self.window, self.states, self.start, self.inputs, backend)

    def one_by_one(self, backend: str) -> list[torch.Tensor]:
        windows = [{name: part[:, t : t + 1] for name, part in self.window.items()} for t in range(self.tokens)]
        return [self.scan(window, self.single, self.zero, None, backend) for window in windows]

    def check(self, backend: str) -> None:
        if self.inputs is not None:
            self.inputs.dt.zero_()  # then the state of the last slot is the kept one
        rows = outer_rows(len(self.start))
        states = self.single[rows].expand(-1, self.tokens, *self.single.shape[2:]).clone()
        window = {name: part[rows] for name, part in self.window.items()}
        expected = self.scan(window, states, self.zero[rows], None, "reference")
        windows = [self.run(backend) for _ in range(2)]  # the second starts from what the first has left
        assert_near(windows[0][rows], expected, "y")
        for y in windows:
            assert_bitwise_equal(y, torch.cat(self.one_by_one(backend), 1), "y, against one token at a time")
        if self.inputs is None:
            assert_bitwise_equal(self.states[:, -1:], self.single, "states, against one token at a time")

    def baselines(self) -> dict[str, Callable[[], object]]:
        tokens, state = self.each_token(), self.single[:, 0]
        baselines = {"torch": lambda: [scan_update(state, **token) for token in tokens]}
        if update := optional("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"):
            theirs = [self.for_mamba_ssm(token) for token in tokens]
            baselines["mamba_ssm"] = lambda: [update(state, **token, dt_softplus=True) for token in theirs]
        return baselines

    def for_mamba_ssm(self, token: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return token


class Scan(Recurrence):
    """selective_scan_verify, gated."""

    op = staticmethod(selective_scan_verify)

    def __init__(
        self, channels: int, state_size: int, batch: int, tokens: int, dtype: torch.dtype, mode: str,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.window = {name: activations(device, batch, tokens, channels) for name in ("x", "dt", "z")}
        self.window |= {name: activations(device, batch, tokens, state_size) for name in ("B", "C")}
        A = -torch.rand(channels, state_size, device=device) * state_size
        self.parameters = A, torch.randn(channels, device=device), torch.randn(channels, device=device) - 4
        shapes = (channels,), (channels,), (1, state_size)
        kept = ReplayBuffer(*(0.1 * torch.rand(batch, tokens, *shape, device=device) for shape in shapes))
        super().__init__((channels, state_size), mode, dtype, kept)

    def each_token(self) -> list[dict[str, torch.Tensor]]:
        rest = dict(zip(("A", "D", "dt_bias"), self.parameters, strict=True))
        return [{name: part[:, t] for name, part in self.window.items()} | rest for t in range(self.tokens)]


class Ssd(Recurrence):
    """ssd_verify with one group; Mamba-2 gates outside of it."""

    op = staticmethod(ssd_verify)

    def __init__(
        self, heads: int, head_size: int, state_size: int, batch: int, tokens: int, dtype: torch.dtype, mode: str,
        device: torch.device,
    ) -> None:  # fmt: skip
        shapes = {"x": (heads, head_size), "dt": (heads,), "B": (1, state_size), "C": (1, state_size)}
        self.window = {name: activations(device, batch, tokens, *shape) for name, shape in shapes.items()}
        A = -torch.rand(heads, device=device) * 16
        self.parameters = A, torch.randn(heads, device=device), torch.randn(heads, device=device) - 4
        kept = ReplayBuffer(
            *(0.1 * torch.rand(batch, tokens, *shapes[name], device=device) for name in ("x", "dt", "B"))
        )
        super().__init__((heads, head_size, state_size), mode, dtype, kept)

    def each_token(self) -> list[dict[str, torch.Tensor]]:
        A, D, dt_bias = self.parameters
        rest = {"A": A[:, None, None], "D": D[:, None], "dt_bias": dt_bias[:, None]}
        x, dt, B, C = (part.unbind(1) for part in self.window.values())
        return [{"x": x[t], "dt": dt[t][..., None], "B": B[t], "C": C[t]} | rest for t in range(self.tokens)]

    def for_mamba_ssm(self, token: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step size, decay and skip for each channel of a head, by strides of 0."""
        head_size, state_size = self.single.shape[-2:]
        A = token["A"].expand(-1, head_size, state_size)
        return (
            token
            | {"A": A}
            | {name: token[name].expand(*token[name].shape[:-1], head_size) for name in ("dt", "D", "dt_bias")}
        )
