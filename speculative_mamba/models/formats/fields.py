"""Reads the fields of a ``config.json``: each has a type and a range; whatever does not fit is refused by name."""

import math
from collections.abc import Collection
from typing import Any

import torch

from ...ops.checks import MAX_CONV_WIDTH
from ...ops.values import shown
from ..config import token_ids

MAX_SIZE = 2**24  # of any dimension of a weight
MAX_HEAD_SIZE = 2**14  # of a head or of the state of a channel
MAX_LAYERS = 2**12
_NUMBERS = 1e-30, 1e30  # float32 holds them, and what is computed from them


def refuse(key: str, value: object, needed: str) -> None:
    raise ValueError(f"config.json gives {key} = {shown(value)}; {needed} is needed")


def _value(config: dict[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def required(config: dict[str, Any], key: str, default: Any = None, *, lo: int = 1, limit: int = MAX_SIZE) -> int:
    """A whole number from ``lo`` to ``limit``."""
    value = _value(config, key, default)
    if not is_integer(value):
        refuse(key, value, "a positive whole number" if lo == 1 else "a whole number")
    if not lo <= value <= limit:
        refuse(key, value, f"a whole number from {lo} to {limit}")
    return value


def flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        refuse(key, value, "true or false")
    return value


def number(config: dict[str, Any], key: str, default: float | None = None, *, limit: float = _NUMBERS[1]) -> float:
    """A positive number."""
    value = _value(config, key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        refuse(key, value, "a positive number")
    if not _NUMBERS[0] <= value <= limit:
        refuse(key, value, f"a number from {_NUMBERS[0]:g} to {limit:g}")
    return float(value)


def numbers(config: dict[str, Any], key: str, count: int) -> tuple[float, ...]:
    """A list of so many positive numbers, or ones."""
    values = _value(config, key, [1.0] * count)
    if not isinstance(values, list) or len(values) != count:
        refuse(key, values, f"a list of {count} numbers")
    return tuple(number({key: value}, key) for value in values)


def epsilon(config: dict[str, Any], key: str, default: float) -> float:
    """What a norm adds to a mean square."""
    return number(config, key, default, limit=1.0)


def expanded(config: dict[str, Any], d_model: int, default: float = 2, *, key: str = "expand") -> int:
    """``expand`` times the width of the model."""
    size = int(number(config, key, default) * d_model)
    if not 1 <= size <= MAX_SIZE:
        refuse(key, config.get(key), f"a size of 1 to {MAX_SIZE} for {key} * {d_model}")
    return size


def conv_width(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """Taps of a convolution."""
    return required(config, key, default, lo=2, limit=MAX_CONV_WIDTH)


def dt_rank(config: dict[str, Any], key: str, d_model: int) -> int:
    rank = config.get(key, "auto")
    return math.ceil(d_model / 16) if rank == "auto" else required(config, key)


def dt_limit(config: dict[str, Any], key: str) -> tuple[float, float]:
    """Two numbers, the second of which may be infinite."""
    value = _value(config, key, [0.0, math.inf])
    limits = value if isinstance(value, list) else []
    # transformers writes infinity, for which JSON has no number, as an object.
    limits = [limit.get("__float__") if isinstance(limit, dict) else limit for limit in limits]
    limits = [math.inf if limit in ("Infinity", "inf") else limit for limit in limits]
    numbers = all(isinstance(limit, int | float) and not isinstance(limit, bool) for limit in limits)
    if len(limits) != 2 or not numbers or not 0 <= limits[0] <= limits[1] or limits[0] > _NUMBERS[1]:
        refuse(key, value, "a list of two numbers, the smaller first,")
    low, high = limits
    return float(low), math.inf if high > _NUMBERS[1] else float(high)


def object_of(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = _value(config, key, {})
    if not isinstance(value, dict):
        refuse(key, value, "an object")
    return value


def indices(config: dict[str, Any], key: str, below: int) -> frozenset[int]:
    """A list of layer numbers."""
    value = _value(config, key, [])
    if not isinstance(value, list) or not all(is_integer(i) and 0 <= i < below for i in value):
        refuse(key, value, f"a list of layers from 0 to {below - 1}")
    return frozenset(value)


def layer_types(config: dict[str, Any], known: Collection[str], default: str, *keys: str) -> list[str]:
    """A kind for every layer, under the first of the keys that is there."""
    layers = required(config, "num_hidden_layers", limit=MAX_LAYERS)
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:
        return [default] * layers
    kinds = config[key]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        refuse(key, kinds, "a list of names")
    if len(kinds) != layers:
        raise ValueError(f"config.json gives {len(kinds)} {key}, but num_hidden_layers = {layers}")
    unknown = next((kind for kind in kinds if kind not in known), None)
    if unknown is not None:
        raise ValueError(f"config.json has {shown(unknown)} in {key}; supported: {', '.join(known)}")
    return kinds


def refuse_other(config: dict[str, Any], key: str, *supported: Any) -> None:
    """The field must be absent or have one of the values."""
    if key in config and config[key] not in supported:
        values = " or ".join(repr(value) for value in supported)
        raise ValueError(f"config.json has {key} = {shown(config[key])}; only {values} is supported")


def refuse_unknown(config: dict[str, Any], where: str, known: str) -> None:
    """Fields that are arguments of a layer: one that is not known may change what it computes."""
    unknown = sorted(set(config) - set(known.split()))
    if unknown:
        raise ValueError(f"config.json has {shown(f'{where}.{unknown[0]}')}, which is not supported")


def divides(part: int, whole: int, what: str) -> int:
    if whole % part:
        raise ValueError(f"config.json gives {what}: {whole} is not a multiple of {part}")
    return part


def eos_token_id(config: dict[str, Any], default: int | None) -> int | tuple[int, ...] | None:
    """One id, several, or none where it says null."""
    value = config.get("eos_token_id", default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_integer(token) and 0 <= token < 2**31 for token in ids):
        refuse("eos_token_id", value, "a token id or a list of them")
    return tuple(value) if isinstance(value, list) else value


def with_eos_token_ids(config: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    """A config with the ids that end a text of another file, called ``name``, as well."""
    try:
        more = token_ids(eos_token_id(other, None))
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", name, 1)) from None
    if not more:
        return config
    ids = list(dict.fromkeys((*token_ids(eos_token_id(config, None)), *more)))
    return config | {"eos_token_id": ids if len(ids) > 1 else ids[0]}


def rotary_frequencies(theta: float, dims: int) -> torch.Tensor:
    """(dims / 2) float32, as the published implementations compute them."""
    return 1.0 / (theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims))
