"""Arguments in memory that nothing may be read or written beside: a kernel that does ends the process."""

import ctypes
import dataclasses
import mmap

import pytest
import torch
from cases import OPS
from description import Row

from speculative_mamba.ops import expert_linear, skinny_linear
from speculative_mamba.ops.block_formats import FORMATS
from speculative_mamba.ops.block_weight import BlockWeight
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.testing.blocks import random_blocks
from speculative_mamba.testing.tolerance import assert_bitwise_equal

OP = "skinny_linear"  # of the tests that are not marked with ops; expert_linear has the same instruction sets
PAGE, NO_ACCESS = mmap.PAGESIZE, 0


def walled(value: object, behind: bool) -> object:
    """A copy of a tensor, or of a weight of several, that begins behind a page without access, or ends before one."""
    if isinstance(value, BlockWeight):
        return dataclasses.replace(value, data=walled(value.data, behind))
    if isinstance(value, ExpertWeight):
        return ExpertWeight(tuple(walled(m, behind) for m in value.matrices), value.format, value.matrix_shape)
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    size = extent * value.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    offset = PAGE + (pages - size if behind else 0)
    copy = torch.frombuffer(memory, dtype=value.dtype, count=extent, offset=offset)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for wall in (begin, begin + PAGE + pages):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
    return copy.as_strided(value.shape, value.stride()).copy_(value)


@pytest.mark.ops(*OPS)
def test_nothing_beside_arguments_is_touched(row: Row, cpu: str) -> None:
    """Catches: a vector for the features behind the last, a slot or a row that does not exist."""
    given = row.make()
    sides = [{name: walled(value, behind) for name, value in given.items()} for behind in (False, True)]
    expected = row.op.results(given, cpu)
    for arguments in sides:
        actual = row.op.results(arguments, cpu)
        for name, result in expected.items():
            assert_bitwise_equal(actual[name], result, name)


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_beside_blocks_is_touched(format: str, cpu: str, behind: bool) -> None:
    """Catches: the scale of the block before the first one."""
    for features, outputs, rows in ((256, 16, 1), (512, 40, 7), (256, 3, 17)):
        weight = BlockWeight.from_gguf(random_blocks(outputs, features, format), format, features)
        x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
        y = skinny_linear(x, weight, backend=cpu)
        behind_walls = walled(x, behind), walled(weight, behind)
        assert_bitwise_equal(skinny_linear(*behind_walls, backend=cpu), y)
        experts = walled(ExpertWeight.of_blocks([weight, weight]), behind)
        chosen = walled(torch.arange(2, dtype=torch.int32).expand(rows, 2).contiguous(), behind)
        actual = expert_linear(behind_walls[0][:, None], chosen, None, experts, backend=cpu)
        assert_bitwise_equal(actual, y[:, None].expand_as(actual))
