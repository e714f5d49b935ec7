"""The stand-in for a GPU finds what it is there to find: planted faults, each in a kernel that is right without it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shim import SHIM, compile_on_shim

BLOCKS = 3
FAULTS = ("none", "no_barrier", "load_beyond", "store_beyond", "store_to_input", "two_blocks", "lost_lane",
          "different_barriers", "early_load", "plain_add", "wide_store",
          "no_wait", "false_constant", "misaligned", "no_group", "young_group", "copy_before_wait",
          "never_awaited", "written_constant")  # fmt: skip
Run = Callable[[str, str, int], tuple[str, torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(kernel, fault, seed): what went wrong, the rows, their sums."""
    library = tmp_path_factory.mktemp("planted") / "planted.so"
    compile_on_shim([SHIM / "planted.cpp"], Path(library), [])
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p

    def call(kernel: str, fault: str, seed: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        rows, sums = torch.randn(BLOCKS, 64), torch.zeros(BLOCKS)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, sums))
        message = function(kernel.encode(), FAULTS.index(fault), *pointers, BLOCKS, seed)
        return message.decode(), rows, sums

    return call


@pytest.mark.parametrize("seed", range(5))
def test_kernels_without_a_fault(run: Run, seed: int) -> None:
    message, rows, sums = run("block_sum", "none", seed)
    assert message == ""
    torch.testing.assert_close(sums, rows.sum(1))
    message, rows, sums = run("warp_sum", "none", seed)
    assert message == ""
    torch.testing.assert_close(sums, rows[:, :32].sum(1))
    message, rows, sums = run("copied_sum", "none", seed)
    assert message == ""
    torch.testing.assert_close(sums, rows.sum(1))
    message, rows, sums = run("count_positive", "none", seed)
    assert message == ""
    assert torch.equal(sums, (rows > 0).sum(1).float())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("kernel", "fault", "found"),
    [
        ("block_sum", "no_barrier", "race"),
        ("block_sum", "misaligned", "misaligned access"),
        ("block_sum", "no_wait", "before the kernel before has ended"),
        ("block_sum", "false_constant", "no constant"),
        ("block_sum", "written_constant", "that a kernel before has written"),
        ("block_sum", "load_beyond", "load out of bounds"),
        ("block_sum", "store_beyond", "store out of bounds"),
        ("block_sum", "store_to_input", "read only"),
        ("block_sum", "two_blocks", "race: two stores"),
        ("warp_sum", "lost_lane", "lanes that have ended"),
        ("warp_sum", "different_barriers", "deadlock"),
        ("count_positive", "no_barrier", "race"),
        ("count_positive", "early_load", "race"),
        ("count_positive", "plain_add", "race"),
        ("count_positive", "wide_store", "race"),
        ("copied_sum", "no_barrier", "race"),
        ("copied_sum", "misaligned", "misaligned access"),
        ("copied_sum", "load_beyond", "load out of bounds"),
        ("copied_sum", "no_group", "a copy goes to"),
        ("copied_sum", "young_group", "a copy goes to"),
        ("copied_sum", "copy_before_wait", "before the kernel before has ended"),
        ("copied_sum", "never_awaited", "before its copies"),
    ],
)
def test_planted_faults(run: Run, kernel: str, fault: str, found: str, seed: int) -> None:
    """Whatever the order in which blocks and threads run. Catches: a shim that finds one of them no more."""
    assert found in run(kernel, fault, seed)[0]
