"""Activations of 16 bits: rounded once, at the end; the same bits for a window at once and token by token."""

import pytest
import torch
from cases import ATTENTION, OPS, SCANS, SELECT_EXPERTS, SILU
from description import Op

from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
of_all = pytest.mark.ops(*(op for op in OPS if op is not SELECT_EXPERTS))  # whose logits are float32


@pytest.fixture(params=SIXTEEN_BITS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def changes(op: Op, dtype: torch.dtype) -> list[dict]:
    """Activations with gaps, and without, which wide loads need. Weights of a matrix or a norm have their dtype."""
    change = {"activations": dtype, "bias": True} | ({} if op.written else {"dtype": dtype})
    whole = {"channels": 40, "heads": 4, "head_size": 16, "x_heads": 4, "c_groups": 2, "in_features": 200}
    if op in SCANS[:1] or op is ATTENTION:
        whole = {"channels": 40}
    return [change, change | whole | {"features": 40, "contiguous": True}]


@of_all
def test_results_are_rounded_once(op: Op, dtype: torch.dtype, backend_of_16_bits: str) -> None:
    """Against float32 arithmetic on the same inputs, no error but that of rounding the result."""
    for change in changes(op, dtype):
        arguments = op.make(change)
        wide = op.copy(arguments)
        narrow = [name for name in op.per_token if wide[name] is not None and wide[name].dtype == dtype]
        wide |= {name: wide[name].float() for name in narrow}
        y, exact = op.run(arguments, backend_of_16_bits), op.run(wide, "reference")
        assert y.dtype == dtype and exact.dtype == torch.float32
        assert_accurate(y, exact.to(dtype), exact.double(), factor=1.01)


@of_all
def test_a_window_at_once_is_its_tokens_one_by_one(op: Op, dtype: torch.dtype, backend_of_16_bits: str) -> None:
    for change in changes(op, dtype):
        arguments = op.make(change)
        if op.written:
            y_steps, states = op.steps(arguments, backend_of_16_bits)
        else:
            rows = [op.cut(arguments, batch=slice(b, b + 1)) for b in range(len(arguments[op.per_token[0]]))]
            y_steps, states = torch.cat([op.run(row, backend_of_16_bits) for row in rows]), []
        assert_bitwise_equal(op.run(arguments, backend_of_16_bits), y_steps, "y")
        for t, state in enumerate(states):
            for name, part in op.slot(arguments, t).items():
                assert_bitwise_equal(part, state[name], f"{name} of slot {t}")


@of_all
def test_the_cpu_kernels_refuse_them(op: Op, dtype: torch.dtype) -> None:
    name = op.per_token[0]
    with pytest.raises(ValueError, match=rf"^{name} must be torch.float32, got {dtype}"):
        op.run(op.make({"activations": dtype}), "cpu")


@pytest.mark.ops(*SCANS, ATTENTION, SILU)
def test_all_activations_of_a_call_have_one_dtype(op: Op, backend_of_16_bits: str) -> None:
    arguments, first = op.make(), op.per_token[0]
    with pytest.raises(ValueError, match=r"must be torch.bfloat16, got torch.float32"):
        op.run(arguments | {first: arguments[first].bfloat16()}, backend_of_16_bits)
