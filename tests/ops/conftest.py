"""Every op on every backend; the CPU kernels on every instruction set of the machine, the CUDA kernels on the CPU."""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from shim import CUDA, built_shim

from speculative_mamba.ops import recording
from speculative_mamba.ops.backend import extension

MODULE = extension()[0]
ISAS = MODULE.available_isas() if MODULE else []
# Test files of an op that are not named after it.
OP_OF = {"test_scan_replay": "selective_scan_verify"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The compiled kernels, once for each instruction set, and the CUDA kernel of the file's op if it has one."""
    op = OP_OF.get(metafunc.module.__name__, metafunc.module.__name__.removeprefix("test_"))
    compiled = [*ISAS, *([f"cuda {op}"] if (CUDA / f"{op}.cu").is_file() else [])]
    for name, params in (("cpu", compiled), ("backend", ["reference", *compiled])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, params, indirect=True)


@pytest.fixture
def select_isa() -> Iterator[Callable[[str], None]]:
    """Switches the CPU kernels to an instruction set; the one in use before comes back after the test."""
    before = MODULE.isa()
    yield MODULE.select_isa
    MODULE.select_isa(before)


@pytest.fixture
def cpu(request: pytest.FixtureRequest) -> str:
    """The backend of the compiled kernels: C++ once for each instruction set, CUDA on the CPU."""
    _, _, op = request.param.partition("cuda ")
    if op:
        shim, monkeypatch = built_shim(), request.getfixturevalue("monkeypatch")
        for module in (importlib.import_module(f"speculative_mamba.ops.{op}.native"), recording):
            monkeypatch.setattr(module, "extension", lambda: (shim, "CUDA kernels on the CPU"))
    else:
        request.getfixturevalue("select_isa")(request.param)
    return "cpu"


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend: PyTorch, and the compiled kernels as in ``cpu``."""
    return "reference" if request.param == "reference" else cpu.__wrapped__(request)


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
