"""Every op on every backend, the CPU kernels on every instruction set of the machine."""

from collections.abc import Callable, Iterator

import pytest
import torch

from speculative_mamba.ops.backend import extension

MODULE = extension()[0]
ISAS = MODULE.available_isas() if MODULE else []


@pytest.fixture
def select_isa() -> Iterator[Callable[[str], None]]:
    """Switches the CPU kernels to an instruction set; the one in use before comes back after the test."""
    before = MODULE.isa()
    yield MODULE.select_isa
    MODULE.select_isa(before)


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest, select_isa: Callable[[str], None]) -> str:
    """The backend of the C++ kernels, once for each instruction set."""
    select_isa(request.param)
    return "cpu"


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend: PyTorch, and the C++ kernels once for each instruction set."""
    if request.param == "reference":
        return "reference"
    request.getfixturevalue("select_isa")(request.param)
    return "cpu"


@pytest.fixture
def fused_isas() -> list[str]:
    """Instruction sets with a fused multiply-add, which promise equal bits."""
    isas = [isa for isa in ISAS if isa != "baseline"]
    if len(isas) < 2:
        pytest.skip(f"needs two instruction sets with a fused multiply-add, this machine has {isas}")
    return isas


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread unless the test asks for more: small tensors are slow on many threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
