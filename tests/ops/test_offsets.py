"""Tensors that span more than 2³¹ elements. The memory between their rows is never touched, and so never there."""

import mmap
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, Random, call

from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "skinny_linear"  # has every kind of kernel

FAR = 2**31
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE
ROOM = 2**16  # elements for each tensor's last row, which lies beyond FAR
NEAR = ("lengths", "residual")  # must be contiguous


@pytest.fixture(scope="module")
def memory() -> Iterator[torch.Tensor]:
    try:
        mapping = mmap.mmap(-1, 4 * (FAR + 16 * ROOM), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"this machine gives no sparse mapping: {error}")
    yield torch.frombuffer(mapping, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _not_copied(request: pytest.FixtureRequest) -> None:
    if any("on gpu" in str(value) for value in request.node.callspec.params.values()):
        pytest.skip("would copy gigabytes to the GPU and back")


def spread(tensors: dict[str, torch.Tensor], memory: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    """Copies whose last row lies FAR elements behind the first."""
    copies = {}
    for number, (name, tensor) in enumerate(tensors.items(), first):
        strides = (-(-FAR // (len(tensor) - 1)), *tensor.stride()[1:])
        copies[name] = tensor.clone()
        if name not in NEAR:
            copies[name] = memory.as_strided(tensor.shape, strides, number * ROOM).copy_(tensor)
    return copies


def test_offsets_beyond_32_bits(op: str, backend: str, memory: torch.Tensor) -> None:
    window, cache, rest = CASES[op](Random(torch.float32))
    far_window, far_cache = spread(window, memory, 0), spread(cache, memory, 8)
    y = call(op, far_window, far_cache, rest, backend)
    expected = call(op, window, cache, rest, backend)
    if backend == "reference":  # PyTorch's matrix product rounds by the alignment of its tensors
        torch.testing.assert_close(y, expected)
    else:
        assert_bitwise_equal(y, expected, "y")
    for name, written in cache.items():
        assert_bitwise_equal(far_cache[name], written, name)


def test_a_weight_beyond_32_bits(gpu_kernels: str, memory: torch.Tensor) -> None:
    window, _, rest = CASES["skinny_linear"](Random(torch.float32))
    weight = {"weight": rest["weight"].float()}
    y = call("skinny_linear", window, {}, rest | spread(weight, memory, 0), gpu_kernels)
    assert_bitwise_equal(y, call("skinny_linear", window, {}, rest | weight, gpu_kernels), "y")
