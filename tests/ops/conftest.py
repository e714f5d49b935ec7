"""Every op on every backend: the CPU kernels on every instruction set of the machine, the CUDA kernels and Triton's on
the CPU, and on the GPU if there is one."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from device import on_device
from emulated import INTERPRETED, SHIM, without_most_emulated
from interpreter import repair
from shim import CUDA, built_shim, synchronize

from speculative_mamba.ops import backend as backends

OPS = Path(backends.__file__).parent
MODULE = backends.extension()[0]
ISAS = MODULE.available_isas() if MODULE else []
# Emulated instructions stand in where the machine has not those themselves, and for sanitizers, which do not see what
# those read.
EMULATED = MODULE.emulated_isas() if MODULE else []
ISAS += [
    isa for isa in EMULATED if isa.removesuffix("_emulated") not in ISAS or "SPECULATIVE_MAMBA_SANITIZE" in os.environ
]
LINEAR_ISAS = ("amx", "amx_emulated", "avx512_vnni", "avx_vnni", "neon_dotprod")
LINEAR_OPS = ("skinny_linear", "expert_linear")  # only they differ there
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, which is when a test first runs it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The kernels of the file's op, which is its ``OP`` or its name. A test that is marked with ops is asked about each
    of them, as ``op``, or about every ``row`` of its table, on each of the kernels that it has."""
    names, marker = metafunc.fixturenames, metafunc.definition.get_closest_marker("ops")
    op = getattr(metafunc.module, "OP", metafunc.module.__name__.removeprefix("test_"))
    if marker is None:
        for name, choose in KERNELS.items():
            if name in names:
                metafunc.parametrize(name, [_param(kernel) for kernel in choose(op)] or _none(), indirect=True)
        return
    subject = "row" if "row" in names else "op"
    subjects = [(op.name, each) for op in marker.args for each in (op.rows() if subject == "row" else [op])]
    fixture = next((name for name in KERNELS if name in names), None)
    if fixture is None:
        metafunc.parametrize(subject, [each for _, each in subjects], ids=str)
        return
    pairs = [_param(kernel, each) for name, each in subjects for kernel in KERNELS[fixture](name)]
    metafunc.parametrize([subject, fixture], pairs or _none(None), indirect=[fixture], ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = without_most_emulated(items, config.getoption("full"))
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def _isas_of(op: str) -> list[str]:
    return [isa for isa in ISAS if op in LINEAR_OPS or isa not in LINEAR_ISAS]


def _kernels_of(op: str) -> list[str]:
    """C++ once for each instruction set, CUDA and Triton where the op has them."""
    kernels = _isas_of(op)
    if (CUDA / f"{op}.cu").is_file():
        kernels += [SHIM, *(["cuda on gpu"] if HAS_GPU else [])]
    if importlib.util.find_spec("triton") and (OPS / op / "triton.py").is_file():
        kernels += ["triton on gpu" if HAS_GPU else INTERPRETED]
    return kernels


def _of_gpu(op: str) -> list[str]:
    return [name for name in _kernels_of(op) if name not in ISAS]


# fixture -> its parameters for an op
KERNELS = {
    "cpu": _isas_of,
    "processor": lambda op: ["reference", *_isas_of(op)],
    "kernels": _kernels_of,
    "gpu_kernels": _of_gpu,
    "gpu_place": _of_gpu,
    "backend": lambda op: ["reference", *_kernels_of(op)],
    "backend_of_16_bits": lambda op: ["reference", *_of_gpu(op)],
}


def _none(*subject: object) -> list[object]:
    """In place of kernels, where none can be tested: a wheel has no csrc/, and Triton need not be there."""
    if CUDA.is_dir():
        return []
    return [pytest.param(*subject, "none", marks=pytest.mark.skip(reason="needs csrc/ or Triton"))]


def _param(kernel: str, *subject: object) -> object:
    return pytest.param(*subject, kernel, marks=[pytest.mark.gpu] if kernel.endswith("on gpu") else [])


@pytest.fixture
def select_isa() -> Iterator[Callable[[str], None]]:
    """Switches the CPU kernels to an instruction set; the one in use before comes back after the test."""
    before = MODULE.isa()
    yield MODULE.select_isa
    MODULE.select_isa(before)


@pytest.fixture
def cpu(request: pytest.FixtureRequest, select_isa: Callable[[str], None]) -> str:
    """The backend of the C++ kernels, once for each instruction set."""
    select_isa(request.param)
    return "cpu"


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of the kernels that the parameter names; for tensors on the CPU, whatever it is."""
    name, _, place = request.param.partition(" on ")
    if request.param in ISAS:
        request.getfixturevalue("select_isa")(request.param)
        yield "cpu"
        return
    name = name.split()[0]
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setitem(backends.BACKENDS, name, (("cpu",), lambda: (True, "for a test")))
    if place == "shim":
        monkeypatch.setattr(backends, "extension", lambda: (built_shim(), "CUDA kernels on the CPU"))
        synchronize()
    if request.param == INTERPRETED:
        repair(monkeypatch)
        monkeypatch.setattr("speculative_mamba.ops.triton_scan.STATES", 1 << 14)  # it is programs that cost
    if place == "gpu":
        found = backends._implementation
        monkeypatch.setattr(backends, "_implementation", lambda op, backend: on_device(found(op, backend), "cuda"))
    backends.resolve.cache_clear()
    yield name
    backends.resolve.cache_clear()


@pytest.fixture
def gpu_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``kernels``, without those of the CPU."""
    yield from kernels.__wrapped__(request)


@pytest.fixture
def gpu_place(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """As ``gpu_kernels``, and the device of models that they run: the GPU where there is one."""
    name, _, place = request.param.partition(" on ")
    if place == "gpu":
        yield name, "cuda"
    else:
        for backend in kernels.__wrapped__(request):
            yield backend, "cpu"


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend: PyTorch, and the kernels as in ``kernels``."""
    if request.param == "reference":
        yield "reference"
    else:
        yield from kernels.__wrapped__(request)


@pytest.fixture
def processor(request: pytest.FixtureRequest) -> Iterator[str]:
    """PyTorch and the C++ kernels: what runs on several threads."""
    yield from backend.__wrapped__(request)


@pytest.fixture
def backend_of_16_bits(request: pytest.FixtureRequest) -> Iterator[str]:
    """What takes activations of 16 bits."""
    yield from backend.__wrapped__(request)


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
