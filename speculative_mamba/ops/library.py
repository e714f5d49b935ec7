"""The ops as PyTorch operators, ``torch.ops.speculative_mamba.<op>``, for ``torch.compile`` and ``torch.export``.

An operator takes tensors and plain values: an argument that holds several is taken apart, so that ``inputs.x`` is the
operator's ``inputs_x``. Direct calls of an op pass the operators by.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterator
from typing import get_args, get_type_hints

import torch

from .backend import refuse_gradients
from .noise import Purpose

_LIBRARY = torch.library.Library("speculative_mamba", "DEF")
_SCHEMA = {
    torch.Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str", Purpose: "int",
    torch.dtype: "ScalarType", tuple[float, float]: "float[]", tuple[torch.Tensor, torch.Tensor]: "(Tensor, Tensor)",
    tuple[torch.Tensor, ...]: "Tensor[]", torch.Size: "SymInt[]",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Part:
    """An argument of an operator. It is that of the op, or where there is a holder one of its fields.

    holders: what else the op's argument may be, whose fields are other parts.
    """

    argument: str
    schema: str
    optional: bool
    holders: tuple[type, ...] = ()
    holder: type | None = None
    field: str = ""

    @property
    def name(self) -> str:
        return f"{self.argument}_{self.field}" if self.holder else self.argument

    def of(self, value: object) -> object:
        """What the operator gets where the op got ``value``."""
        if self.holder:
            value = getattr(value, self.field) if isinstance(value, self.holder) else None
        elif isinstance(value, self.holders):
            return None
        return list(value) if isinstance(value, tuple) else value


def _options(hint: object) -> tuple:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _parts(argument: str, hint: object) -> Iterator[_Part]:
    options = _options(hint)
    optional = len(options) > 1
    holders = tuple(filter(dataclasses.is_dataclass, options))
    for option in options:
        if option in _SCHEMA:
            yield _Part(argument, _SCHEMA[option], optional, holders)
        elif option in holders:
            hints = get_type_hints(option)
            for field in (field.name for field in dataclasses.fields(option) if field.init):
                kind, *others = _options(hints[field])
                yield _Part(argument, _SCHEMA[kind], optional or bool(others), (), option, field)


class _Operator:
    """An op's operator. writes, returns: as ``operator`` says."""

    def __init__(self, op: Callable, writes: Collection[str], returns: Callable) -> None:
        hints = get_type_hints(op)
        self._op, self._returns = op, returns
        self._defaults = {
            name: None if its.default is inspect.Parameter.empty else its.default
            for name, its in inspect.signature(op).parameters.items()
        }
        self._names = list(self._defaults)
        self._parts = [part for name in self._names for part in _parts(name, hints[name])]
        written = iter("abcdefghijklmnopqrstuvwxyz")
        arguments = []
        for part in self._parts:
            schema = part.schema
            if part.argument in writes:
                schema += f"({next(written)}!)"
            arguments.append(f"{schema}{'?' if part.optional else ''} {part.name}")
        name = op.__name__
        _LIBRARY.define(f"{name}({', '.join(arguments)}) -> {_SCHEMA[hints['return']]}")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_LIBRARY.ns}::{name}", self._run_fake, lib=_LIBRARY)
        self._operator = getattr(getattr(torch.ops, _LIBRARY.ns), name).default

    def __call__(self, *args: object, **kwargs: object) -> object:
        """As the op is called."""
        return self._operator(*self.arguments(*args, **kwargs))

    def arguments(self, *args: object, **kwargs: object) -> list[object]:
        """Those of the operator for a call of the op."""
        if unknown := [name for name in kwargs if name not in self._defaults]:
            raise TypeError(f"{self._op.__name__} takes no argument {unknown[0]}")
        if len(args) > len(self._names):
            raise TypeError(f"{self._op.__name__} takes {len(self._names)} arguments at most, got {len(args)}")
        # In words that torch 2.6 traces: no zip, no | of dicts.
        given = {**self._defaults, **{self._names[i]: value for i, value in enumerate(args)}, **kwargs}
        return [part.of(given[part.argument]) for part in self._parts]

    def _run(self, *values: object) -> object:
        arguments: dict[str, object] = {}
        held: dict[tuple[str, type], dict[str, object]] = {}
        for part, value in zip(self._parts, values, strict=True):
            if isinstance(value, list):
                value = torch.Size(value) if part.schema == _SCHEMA[torch.Size] else tuple(value)
            if part.holder:
                held.setdefault((part.argument, part.holder), {})[part.field] = value
            else:
                arguments[part.argument] = value
        for (argument, holder), its in held.items():
            if any(value is not None for value in its.values()):
                arguments[argument] = holder(**its)
            else:
                arguments.setdefault(argument, None)
        return self._op(**arguments)

    def _run_fake(self, *values: object) -> object:
        named = {part.name: value for part, value in zip(self._parts, values, strict=True)}
        refuse_gradients(self._op.__name__, named)
        return self._returns(**named)


def operator(*, writes: Collection[str] = (), returns: Callable[..., object]) -> Callable[[Callable], Callable]:
    """Registers an op's operator, which a compiler that traces the op finds in its place.

    writes: names of arguments that a call writes. returns: from the operator's arguments, by name, to tensors of the
    shape and dtype of its results.
    """

    def registered(op: Callable) -> Callable:
        its = _Operator(op, writes, returns)

        @functools.wraps(op)
        def call(*args: object, **kwargs: object) -> object:
            return its(*args, **kwargs) if torch.compiler.is_compiling() else op(*args, **kwargs)

        call.operator = its
        return call

    return registered
