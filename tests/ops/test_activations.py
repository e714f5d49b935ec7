"""Activations of 16 bits: rounded once, at the end; the same bits for a window at once and token by token."""

from collections.abc import Callable

import pytest
import torch
from cases import CASES, Random, call

from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


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
