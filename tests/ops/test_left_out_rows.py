"""Rows whose ``start_slot`` is -1 take no part in a call: y is 0, and nothing of their buffers is read or written."""

from collections.abc import Iterator

import pytest
import torch
from cases import CASES, B, Random, T

from speculative_mamba import ops
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "ssd_verify"  # has every kind of kernel
INPUTS = {"selective_scan_verify": ((40,), (40,), (1, 16)), "ssd_verify": ((4, 10), (4,), (2, 16))}  # x, dt, B
MODES = [(op, "states") for op in CASES if op.endswith("_verify")] + [(op, "inputs") for op in INPUTS]
CALLS = {"from slot 0": {}, "going on": {"write_slot": 1}, "prefill": {"final_state_only": True}}
ROWS = {"first": [0], "last": [1], "all": [0, 1]}


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call(op: str, window: dict, cache: dict, rest: dict, start: torch.Tensor, backend: str) -> torch.Tensor:
    cache = dict(cache)
    kept = [cache.pop(f"inputs.{name}") for name in ("x", "dt", "B") if f"inputs.{name}" in cache]
    if kept:
        rest = rest | {"inputs": ReplayBuffer(*kept)}
    return getattr(ops, op)(**window, **cache, **rest, start_slot=start, backend=backend)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("other", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("name", "mode"), MODES, ids=str)
def test_the_others_go_on_as_if_alone(name: str, mode: str, other: dict, rows: list[int], backend: str) -> None:
    random = Random(torch.float32)
    window, cache, rest = CASES[name](random)
    window = {key: tensor[:, : T - 1] for key, tensor in window.items()}
    if mode == "inputs":
        cache["states"] = cache["states"][:, :1].contiguous()
        for key, shape in zip(("x", "dt", "B"), INPUTS[name], strict=True):
            cache[f"inputs.{key}"] = random(B, T, *shape).abs()
    left_padding = torch.tensor([2, 1], dtype=torch.int32) if other.get("final_state_only") else None
    start = torch.zeros(B, dtype=torch.int32)
    start[rows] = -1
    for tensor in cache.values():
        tensor[rows] = torch.nan if tensor.is_floating_point() else 10**9
    others = [row for row in range(B) if row not in rows]
    window_alone, alone = ({key: tensor[others] for key, tensor in part.items()} for part in (window, cache))
    before = {key: tensor.clone() for key, tensor in cache.items()}

    y = call(name, window, cache, rest | other | {"left_padding": left_padding}, start, backend)
    assert_bitwise_equal(y[rows], torch.zeros_like(y[rows]), "y of the rows that are left out")
    for key, tensor in cache.items():
        assert_bitwise_equal(tensor[rows], before[key][rows], f"{key} of the rows that are left out")
    nulls = None if left_padding is None else left_padding[others]
    y_alone = call(name, window_alone, alone, rest | other | {"left_padding": nulls}, start[others], backend)
    assert_bitwise_equal(y[others], y_alone, "y of the others")
    for key, tensor in cache.items():
        assert_bitwise_equal(tensor[others], alone[key], f"{key} of the others")
