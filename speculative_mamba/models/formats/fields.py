"""Reads the fields of a ``config.json``; whatever does not fit is refused by name."""

from typing import Any

import torch


def required(config: dict[str, Any], key: str, default: Any = None) -> int:
    """A positive whole number."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json gives {key} = {value!r}; a positive whole number is needed")
    return value


def flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json gives {key} = {value!r}; true or false is needed")
    return value


def number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"config.json gives {key} = {value!r}; a positive number is needed")
    return float(value)


def object_of(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"config.json gives {key} = {value!r}; an object is needed")
    return value


def indices(config: dict[str, Any], key: str, below: int) -> frozenset[int]:
    """A list of layer numbers."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < below for i in value):
        raise ValueError(f"config.json gives {key} = {value!r}; a list of layers from 0 to {below - 1} is needed")
    return frozenset(value)


def refuse_other(config: dict[str, Any], key: str, *supported: Any) -> None:
    """The field must be absent or have one of the values."""
    if key in config and config[key] not in supported:
        values = " or ".join(repr(value) for value in supported)
        raise ValueError(f"config.json has {key} = {config[key]!r}; only {values} is supported")


def refuse_unknown(config: dict[str, Any], where: str, known: str) -> None:
    """Fields that are arguments of a layer: one that is not known may change what it computes."""
    unknown = sorted(set(config) - set(known.split()))
    if unknown:
        raise ValueError(f"config.json has {where}.{unknown[0]}, which is not supported")


def divides(part: int, whole: int, what: str) -> int:
    if whole % part:
        raise ValueError(f"config.json gives {what}: {whole} is not a multiple of {part}")
    return part


def eos_token_id(config: dict[str, Any], default: int | None) -> int | tuple[int, ...] | None:
    value = config.get("eos_token_id", default)
    return tuple(value) if isinstance(value, list) else value


def rotary_frequencies(theta: float, dims: int) -> torch.Tensor:
    """(dims / 2) float32, as the published implementations compute them."""
    return 1.0 / (theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims))
