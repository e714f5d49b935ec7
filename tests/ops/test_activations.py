"""Activations of 16 bits: rounded once, at the end; the same bits for a window at once and token by token."""

from collections.abc import Callable

import pytest
import torch

from speculative_mamba import ops
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

B, T, D, N = 2, 5, 40, 16
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Random:
    """Tensors that are the same for every call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def activations(self, *shape: int) -> torch.Tensor:
        return self(*shape).to(self.dtype)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def slots(self, *shape: int) -> torch.Tensor:
        """(B, T, …), of which slot 0 is a start state and the rest unread."""
        slots = torch.full((B, T, *shape), torch.nan)
        slots[:, 0] = self(B, *shape)
        return slots


def conv(r: Random) -> tuple[dict, dict, dict]:
    window = torch.cat([r(B, 4, D), torch.full((B, T - 1, D), torch.nan)], 1)
    return {"x": r.activations(B, T, D)}, {"window": window}, {"weight": r(D, 4), "bias": r(D)}


def scan(r: Random) -> tuple[dict, dict, dict]:
    window = {name: r.activations(B, T, D) for name in ("x", "dt", "z")}
    window |= {name: r.activations(B, T, N) for name in ("B", "C")}
    return window, {"states": r.slots(D, N)}, {"A": -r(D, N).exp(), "D": r(D), "dt_bias": r(D)}


def ssd(r: Random) -> tuple[dict, dict, dict]:
    heads, size = 4, 10
    window = {"x": r.activations(B, T, heads, size), "dt": r.activations(B, T, heads)}
    window |= {"z": r.activations(B, T, heads, size)}
    window |= {name: r.activations(B, T, 2, N) for name in ("B", "C")}
    return window, {"states": r.slots(heads, size, N)}, {"A": -r(heads).exp(), "D": r(heads), "dt_bias": r(heads)}


def attention(r: Random) -> tuple[dict, dict, dict]:
    window = {"q": r.activations(B, T, 4, 16), "k": r.activations(B, T, 2, 16), "v": r.activations(B, T, 2, 16)}
    lengths = torch.full((B, T), -1, dtype=torch.int32)
    lengths[:, 0] = torch.tensor([3, 37])
    cache = {"keys": r(B, 2, 64, 16), "values": r(B, 2, 64, 16), "lengths": lengths}
    return window, cache, {"inv_freq": torch.tensor([1.0, 0.1, 0.01])}


def linear(r: Random) -> tuple[dict, dict, dict]:
    return {"x": r.activations(B * T, 200)}, {}, {"weight": r.activations(33, 200), "bias": r(33)}


def norm(r: Random) -> tuple[dict, dict, dict]:
    return {"x": r.activations(B * T, D), "residual": r(B * T, D)}, {}, {"weight": r.activations(D)}


def silu(r: Random) -> tuple[dict, dict, dict]:
    return {"gate": r.activations(B * T, D), "up": r.activations(B * T, D)}, {}, {}


# op -> what depends on the token, what is written, the rest
CASES = {
    "causal_conv1d_verify": conv, "selective_scan_verify": scan, "ssd_verify": ssd, "attention_verify": attention,
    "skinny_linear": linear, "rms_norm": norm, "gated_silu": silu,
}  # fmt: skip


def call(op: str, window: dict, cache: dict, rest: dict, backend: str, start: int = 0, first: int = 0) -> torch.Tensor:
    if cache:
        rest = rest | {"start_slot": torch.full((B,), start, dtype=torch.int32), "write_slot": first}
    y = getattr(ops, op)(**window, **cache, **rest, backend=backend)
    return y[0] if isinstance(y, tuple) else y


@pytest.fixture(params=SIXTEEN_BITS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_results_are_rounded_once(op: str, dtype: torch.dtype, backend: str) -> None:
    """Against float32 arithmetic on the same inputs, no error but that of rounding the result."""
    window, cache, rest = CASES[op](Random(dtype))
    y = call(op, window, {name: tensor.clone() for name, tensor in cache.items()}, rest, backend)
    wide = {name: tensor.float() for name, tensor in window.items()}
    exact = call(op, wide, cache, rest, "reference")
    assert y.dtype == dtype and exact.dtype == torch.float32
    assert_accurate(y, exact.to(dtype), exact.double(), factor=1.01)


def test_a_window_at_once_is_its_tokens_one_by_one(op: str, dtype: torch.dtype, backend: str) -> None:
    window, at_once, rest = CASES[op](Random(dtype))
    one_by_one = {name: tensor.clone() for name, tensor in at_once.items()}
    y = call(op, window, at_once, rest, backend)
    tokens_at = 1 if at_once else 0
    for t in range(y.shape[tokens_at]):
        token = {name: tensor.narrow(tokens_at, t, 1) for name, tensor in window.items()}
        alone = call(op, token, one_by_one, rest, backend, max(t - 1, 0), t)
        assert_bitwise_equal(alone, y.narrow(tokens_at, t, 1), f"y of token {t}")
    for name, written in at_once.items():
        assert_bitwise_equal(one_by_one[name], written, name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cpu_kernels_refuse_them(case: Callable, dtype: torch.dtype) -> None:
    op = next(name for name, other in CASES.items() if other is case)
    window, cache, rest = case(Random(dtype))
    with pytest.raises(ValueError, match=rf"^{next(iter(window))} must be torch.float32, got {dtype}"):
        call(op, window, cache, rest, "cpu")


def test_all_activations_of_a_call_have_one_dtype(op: str, backend: str) -> None:
    window, cache, rest = CASES[op](Random(torch.float32))
    first = next(iter(window))
    mixed = window | {first: window[first].bfloat16()}
    if op in ("causal_conv1d_verify", "skinny_linear", "rms_norm"):
        pytest.skip("one activation only")
    with pytest.raises(ValueError, match=r"must be torch.bfloat16, got torch.float32"):
        call(op, mixed, cache, rest, backend)
