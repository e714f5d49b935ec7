"""What the questions have to know of an op: its arguments with NaN in memory that must not be read, what a slot holds,
and where a NaN goes. The ops themselves are in ``cases.py``."""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from speculative_mamba import ops

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
Arguments = dict[str, Any]


class Random:
    """Tensors from a seed; those of a window lie in wider ones full of NaN unless they shall be contiguous."""

    def __init__(self, parameters: dict, lead: tuple[int, ...], seed: int) -> None:
        self.lead, self.dtype, self.contiguous = lead, parameters["activations"], parameters["contiguous"]
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def window(self, *shape: int) -> torch.Tensor:
        return self.inside(self(*self.lead, math.prod(shape)).to(self.dtype)).unflatten(-1, shape)

    def inside(self, tensor: torch.Tensor, value: float = math.nan) -> torch.Tensor:
        """The tensor as part of a wider one."""
        return tensor if self.contiguous else F.pad(tensor, (3, 2), value=value)[..., 3:-2]

    def slots(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """(B, S, …) of NaN, with gaps between the slots unless contiguous."""
        return torch.full((*shape[:2], 1 if self.contiguous else 2, *shape[2:]), math.nan, dtype=dtype)[:, :, 0]


@dataclass(frozen=True, eq=False)
class Row:
    """A row of an op's table: what differs from the base row."""

    op: "Op"
    change: dict

    def __str__(self) -> str:
        return "-".join([self.op.name, *(f"{k}={v}" for k, v in self.change.items())])

    def make(self, seed: int = 0, start: int = 0) -> Arguments:
        return self.op.make(self.change, seed, start)


class Op:
    """What the questions have to know of an op; ops without slots write nothing.

    ``nan``: an argument, the place of its NaN, and the places of y that depend on it.
    """

    name: str
    base: dict
    changes: tuple[dict, ...]
    large: dict  # work for many threads
    per_token: tuple[str, ...]
    written: tuple[str, ...] = ()
    nan: tuple[tuple[str, tuple, tuple], ...]
    nan_change: dict = {}  # noqa: RUF012

    def __str__(self) -> str:
        return self.name

    def rows(self) -> list[Row]:
        return [Row(self, change) for change in self.changes]

    def make(self, change: dict | None = None, seed: int = 0, start: int = 0) -> Arguments:
        """Arguments of the op; of its slots only ``start`` holds numbers."""
        c = {"contiguous": False, "activations": FLOAT32} | self.base | (change or {})
        r = Random(c, (c["batch"], c["tokens"]) if self.written else (c["rows"],), seed)
        arguments = self.arguments(c, r)
        if self.written:
            arguments["start_slot"] = torch.full((c["batch"],), start, dtype=torch.int32)
            self.put(arguments, self.state(c, r))
        return arguments

    def arguments(self, c: dict, r: Random) -> Arguments:
        raise NotImplementedError

    def call(self, arguments: Arguments, backend: str, **other: Any) -> torch.Tensor | tuple:
        return getattr(ops, self.name)(**{**arguments, **other}, backend=backend)

    def run(self, arguments: Arguments, backend: str, **other: Any) -> torch.Tensor:
        y = self.call(arguments, backend, **other)
        return y[0] if isinstance(y, tuple) else y

    def results(self, arguments: Arguments, backend: str, **other: Any) -> dict[str, torch.Tensor]:
        """All that a call returns and writes, by name."""
        y = self.call(arguments, backend, **other)
        named = {"y": y} if torch.is_tensor(y) else dict(zip(("y", "residual"), y, strict=True))
        return named | {name: arguments[name] for name in self.written}

    def exact(self, arguments: Arguments) -> tuple[dict[str, torch.Tensor], Arguments]:
        """The specification in float64: what it returns, and the arguments after it."""

        def double(value: Any) -> Any:
            if value is FLOAT32:
                return torch.float64
            return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

        with mock.patch(f"speculative_mamba.ops.{self.name}.run") as run:
            self.call(arguments, "reference")
        args = run.call_args.args[2]
        args = type(args)(*map(double, args))
        y = getattr(import_module(f"speculative_mamba.ops.{self.name}.reference"), self.name)(args)
        named = {"y": y} if torch.is_tensor(y) else dict(zip(("y", "residual"), y, strict=True))
        return named, args._asdict()

    # Of ops with slots.

    def state(self, c: dict, r: Random) -> dict[str, torch.Tensor]:
        """What the start slot holds in each row."""
        raise NotImplementedError

    def slot(self, arguments: Arguments, slots: torch.Tensor | int | None = None) -> dict[str, torch.Tensor]:
        """What a slot of each row holds, ``start_slot`` if none is given; a copy."""
        raise NotImplementedError

    def put(self, arguments: Arguments, state: dict[str, torch.Tensor]) -> None:
        """Writes what the start slot holds."""
        raise NotImplementedError

    def unwritten(self, arguments: Arguments, slots: int) -> dict[str, torch.Tensor]:
        """A cache of that many slots, of which none was written."""
        raise NotImplementedError

    def touched(self, arguments: Arguments, write_slot: int, tokens: int) -> dict[str, torch.Tensor]:
        """Masks of what a call that starts from these arguments may write."""
        raise NotImplementedError

    def chosen(self, arguments: Arguments, slots: torch.Tensor | int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of a slot in each row."""
        start = arguments["start_slot"]
        slots = start if slots is None else torch.as_tensor(slots).expand_as(start)
        return torch.arange(len(start)), slots.long()

    def num_tokens(self, arguments: Arguments) -> int:
        return arguments[self.per_token[0]].shape[1]

    def more(self, arguments: Arguments, change: dict, seed: int) -> Arguments:
        """The same with the tokens of another seed."""
        return arguments | {name: part for name, part in self.make(change, seed).items() if name in self.per_token}

    def cut(
        self, arguments: Arguments, tokens: slice = slice(None), batch: slice | list[int] = slice(None)
    ) -> Arguments:
        """Views of some tokens and rows."""
        names = (*self.per_token, *self.written)
        part = {name: arguments[name][batch] for name in names if arguments[name] is not None}
        if self.written:
            part |= {name: part[name][:, tokens] for name in self.per_token if name in part}
            part["start_slot"] = arguments["start_slot"][batch]
        return arguments | part

    def copy(self, arguments: Arguments) -> Arguments:
        """With copies of what a call may find changed. What is only read stays where it is: PyTorch rounds by that."""
        names = [name for name in (*self.written, "start_slot") if name in arguments]
        return arguments | {name: arguments[name].clone() for name in names}

    def split(self, arguments: Arguments, pieces: list[int]) -> list[Arguments]:
        ends = torch.tensor(pieces).cumsum(0).tolist()
        return [self.cut(arguments, slice(end - length, end)) for end, length in zip(ends, pieces, strict=True)]

    def one_slot(self, arguments: Arguments) -> Arguments:
        """The same with a cache of one slot, which holds what the start slots do."""
        alone = arguments | self.unwritten(arguments, 1) | {"start_slot": torch.zeros_like(arguments["start_slot"])}
        self.put(alone, self.slot(arguments))
        return alone

    def walk(self, arguments: Arguments, backend: str) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """y and what the slot holds after each of T calls of one token, which read and write the only slot."""
        y, states = [], []
        for t in range(self.num_tokens(arguments)):
            y.append(self.run(self.cut(arguments, slice(t, t + 1)), backend))
            states.append(self.slot(arguments))
        return torch.cat(y, 1), states

    def steps(self, arguments: Arguments, backend: str) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """As ``walk``, on a cache of its own that never held anything else: plain decoding."""
        return self.walk(self.one_slot(arguments), backend)

    def accept(self, arguments: Arguments, slots: torch.Tensor | list[int]) -> None:
        """The next call starts from these slots. Nothing else that is left may be read."""
        state = self.slot(arguments, torch.as_tensor(slots))
        arguments["start_slot"].copy_(torch.as_tensor(slots))
        for name in self.written:
            arguments[name].fill_(math.nan if arguments[name].is_floating_point() else 10**9)
        self.put(arguments, state)
