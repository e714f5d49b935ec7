"""Tensors that span more than 2³¹ elements. The memory between their rows is never touched, and so never there."""

import mmap
from collections.abc import Iterator

import pytest
import torch
from cases import LINEAR, OPS
from description import Op

from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "skinny_linear"  # has every kind of kernel

FAR = 2**31
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE
ROOM = 2**16  # elements for each tensor's last row, which lies beyond FAR
NEAR = ("lengths", "residual", "experts", "expert_weights")  # must be contiguous


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


def spread(tensors: dict[str, torch.Tensor], memory: torch.Tensor, first: int = 0) -> dict[str, torch.Tensor]:
    """Copies whose last row lies FAR elements behind the first."""
    copies = {}
    for number, (name, tensor) in enumerate(tensors.items(), first):
        strides = (-(-FAR // (len(tensor) - 1)), *tensor.stride()[1:])
        copies[name] = tensor.clone()
        if name not in NEAR:
            copies[name] = memory.as_strided(tensor.shape, strides, number * ROOM).copy_(tensor)
    return copies


@pytest.mark.ops(*OPS)
def test_offsets_beyond_32_bits(op: Op, backend: str, memory: torch.Tensor) -> None:
    """Catches: an offset of 32 bits."""
    near = op.make({"contiguous": True})
    names = [name for name in (*op.per_token, *op.written) if near[name] is not None]
    far = near | spread({name: near[name] for name in names}, memory)
    results, expected = op.results(far, backend), op.results(near, backend)
    if backend == "reference":  # PyTorch's matrix product rounds by the alignment of its tensors
        torch.testing.assert_close(results.pop("y"), expected.pop("y"))
    for name, result in results.items():
        assert_bitwise_equal(result, expected[name], name)


def test_a_weight_beyond_32_bits(kernels: str, memory: torch.Tensor) -> None:
    """Of which the last row is the first of a tile of any kernel. Catches: a tile's offset of 32 bits."""
    arguments = LINEAR.make({"out_features": 129})
    far = arguments | spread({"weight": arguments["weight"]}, memory)
    assert_bitwise_equal(LINEAR.run(far, kernels), LINEAR.run(arguments, kernels), "y")
