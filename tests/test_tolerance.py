"""The gate of what is promised bit for bit."""

import pytest
import torch

from speculative_mamba.testing.tolerance import assert_bitwise_equal

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_of_both_signs_differ(dtype: torch.dtype) -> None:
    zeros, other = torch.zeros(2, 3).to(dtype), torch.zeros(2, 3).to(dtype)
    assert_bitwise_equal(zeros, other)
    other[1, 2] = torch.tensor(-0.0).to(dtype)
    with pytest.raises(AssertionError, match=r"1 of .* first at \(1, 2"):
        assert_bitwise_equal(zeros, other)


def test_one_nan_equals_another_and_nothing_else() -> None:
    words = torch.tensor([0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32)  # quiet, negative, signalling
    nans = words.view(torch.float32)
    assert_bitwise_equal(nans, nans.roll(1))
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_bitwise_equal(nans, torch.tensor([torch.nan, torch.inf, torch.nan]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.uint16], ids=str)
def test_whole_numbers(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0, 1, 1]).to(dtype)
    assert_bitwise_equal(numbers, numbers.clone())
    with pytest.raises(AssertionError, match=r"first at \(0,\)"):
        assert_bitwise_equal(numbers, torch.tensor([1, 1, 1]).to(dtype))
