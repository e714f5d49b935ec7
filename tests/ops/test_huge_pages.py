"""Memory for weights: as PyTorch's own, but in mappings for which huge pages were asked."""

import mmap
import pickle
import re
from pathlib import Path

import pytest
import torch

from speculative_mamba.ops import huge_pages
from speculative_mamba.ops.block_weight import numbers_of_gguf

CPU = torch.device("cpu")
SIZE = 3 << 20
linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")


def tensors(count, size=SIZE):
    return [huge_pages.empty(size, dtype=torch.uint8, device=CPU).fill_(number) for number in range(count)]


def flags_at(address):
    """The kernel's of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags"):
            return line.split()[1:]
    return None


@pytest.mark.parametrize("shape", [(0,), (5, 7), (300, 1000), (2, 3, 100_001), (9 << 20,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_tensor_as_any_other(shape, dtype):
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.uint8).view(shape)
    tensor = huge_pages.copy(values.transpose(0, -1), dtype)
    assert tensor.is_contiguous() and tensor.dtype is dtype and torch.equal(tensor, values.transpose(0, -1).to(dtype))
    assert tensor.untyped_storage().nbytes() == tensor.nbytes  # so that a copy of it copies no more
    assert tensor.data_ptr() % 64 == 0 or tensor.nbytes < 64


def test_no_tensor_lies_in_another():
    many = tensors(60)
    assert all((tensor == number).all() for number, tensor in enumerate(many))
    assert torch.equal(pickle.loads(pickle.dumps(many[7])), many[7])


def is_told():
    """Whether this system has huge pages, and tells for which mappings they were asked; an emulator does not."""
    memory = huge_pages._mapping(1 << 21)
    return "hg" in (flags_at(torch.frombuffer(memory, dtype=torch.uint8).data_ptr()) or ())


@linux
def test_huge_pages_are_asked_for():
    asked = []

    class Asked(mmap.mmap):
        def madvise(self, advice):
            asked.append(advice)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap, "mmap", Asked)
        assert (tensors(1, 33 << 20)[0] == 0).all() and asked == [mmap.MADV_HUGEPAGE]
    if not is_told():
        pytest.skip("the system does not tell for which memory huge pages were asked")
    small, large = tensors(2)[1], tensors(1, 33 << 20)[0]
    assert all("hg" in flags_at(tensor.data_ptr()) for tensor in (small, large))


@linux
def test_a_mapping_goes_with_its_last_tensor(monkeypatch):
    monkeypatch.setattr(huge_pages, "_arena", huge_pages._Arena())
    one, other = tensors(2, 1 << 20)
    del one
    assert huge_pages._arena.memory() is not None and (other == 1).all()
    del other
    assert huge_pages._arena.memory() is None


@linux
def test_a_system_that_has_none(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(huge_pages, "_arena", huge_pages._Arena())
    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert (tensors(3)[2] == 2).all()


@linux
def test_memory_that_the_system_does_not_give_is_refused_by_pytorch():
    for shape in ((1 << 60,), (1 << 40, 1 << 40)):
        with pytest.raises(RuntimeError, match=r"memory|overflow"):
            huge_pages.empty(*shape, dtype=torch.uint8, device=CPU)


@linux
def test_what_was_needed_for_a_while_keeps_no_memory(monkeypatch):
    """Values of blocks, beside which the blocks were in memory."""
    mapping, sizes = huge_pages._mapping, []
    monkeypatch.setattr(huge_pages, "_mapping", lambda size: sizes.append(size) or mapping(size))
    numbers_of_gguf(torch.zeros(4096, 34 * 32, dtype=torch.uint8), "q8_0", 1024, torch.float32)
    assert sizes == [4096 * 1024 * 4]
