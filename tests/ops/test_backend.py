"""Which backend runs, what happens when the extension is broken, and the pool of threads."""

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import types
from pathlib import Path

import pytest
import torch

from speculative_mamba import __version__
from speculative_mamba.ops import backend as backends
from speculative_mamba.ops import rms_norm, selective_scan_verify, skinny_linear
from speculative_mamba.ops import threads as threads_of
from speculative_mamba.testing.tolerance import assert_bitwise_equal

PACKAGE = Path(backends.__file__).parents[1]


def python(script: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a script in a fresh interpreter, which finds packages in ``folder`` first; a hang is an error."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, cwd=folder)


def test_the_kernels_are_built_and_in_use() -> None:
    module, reason = backends.extension()
    assert module is not None, reason
    assert backends.resolve("auto", "cpu") == "cpu"


def _break(extension: Path, how: str) -> None:
    if how == "garbage":
        extension.write_bytes(b"not a shared library" * 100)
    elif how == "unresolved symbol":
        compiler = shutil.which("cc") or shutil.which("g++")
        if compiler is None:
            pytest.skip("needs a C compiler")
        source = extension.with_name("broken.c")
        source.write_text("int nowhere(void); void *PyInit__C(void) { return nowhere() ? &nowhere : 0; }")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(extension), str(source)], check=True)


USE = """
import sys
# Without an editable installation's finder, which would find the working extension.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import speculative_mamba as sm
from speculative_mamba.testing.models import random_model, tiny_config
model = random_model(tiny_config())
result = sm.generate(model, [[1, 2, 3], [4]], draft=model, lookahead=3, max_new_tokens=6)
print(sm.__file__, model.backend, [len(row) for row in result.sequences], sep="\\n")
try:
    random_model(tiny_config(), backend="cpu")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["missing", "garbage", "unresolved symbol"])
def test_a_broken_extension_costs_one_line_and_the_reference_runs(how: str, tmp_path: Path) -> None:
    copy = tmp_path / "speculative_mamba"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors"))
    _break(copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", how)
    result = python(USE, tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("speculative_mamba: backend 'cpu' is off: speculative_mamba._C cannot be loaded (")
    command = "pip install --force-reinstall --no-deps speculative-mamba"  # the copy is no source tree
    assert line.endswith((f"; get it with: {command}", f": run from another folder or use {command}"))
    file, backend, lengths, refusal = result.stdout.splitlines()
    assert (file, backend, lengths) == (str(copy / "__init__.py"), "reference", "[9, 7]")
    assert refusal == line.removeprefix("speculative_mamba: ")


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_a_folder_without_kernels_names_the_installed_copy_that_it_hides(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "speculative_mamba"
    installed.mkdir()
    (installed / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, f"speculative_mamba.{name}", None)
    probe = backends.extension if name == "_C" else backends.cuda_extension
    module, reason = probe.__wrapped__()
    assert module is None and f"{PACKAGE} hides the copy in {installed}, which has it" in reason
    wheel = "speculative-mamba" if name == "_C" else "speculative-mamba-cuda"
    cure = "pip install -e ." if (PACKAGE.parent / "setup.py").exists() else f"--no-deps {wheel}"
    assert reason.endswith(cure) and "\n" not in reason


def test_the_script_says_that_another_copy_runs_or_what_is_not_installed(tmp_path: Path) -> None:
    checkout = tmp_path / "speculative_mamba"
    checkout.mkdir()
    script = shutil.copy(PACKAGE / "run.py", checkout)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, script, "info"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    (line,) = result.stderr.splitlines()
    assert f"this runs the installed copy in {PACKAGE}, not {checkout}" in line and result.returncode == 0
    assert result.stdout.splitlines()[0].endswith(f" in {PACKAGE}")
    command = [sys.executable, "-I", "-S", PACKAGE / "run.py", "info"]  # a Python without packages
    result = subprocess.run(command, capture_output=True, text=True, timeout=90)
    (line,) = result.stderr.splitlines()
    assert "torch is not installed here; install it with: " in line and result.returncode == 2


def test_a_named_backend_runs_or_raises() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'; choose from: auto, cpu, cuda, triton, reference"):
        backends.resolve("gpu", "cpu")
    for name in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"backend '{name}' does not run on device 'cpu'; it runs on cuda"):
            backends.resolve(name, "cpu")
    with pytest.raises(ValueError, match="backend 'cpu' does not run on device 'cuda'; it runs on cpu"):
        backends.resolve("cpu", "cuda")
    with pytest.raises(ValueError, match="no backend for device 'meta'"):
        backends.resolve("auto", "meta")


def test_the_environment_chooses_the_instruction_set(select_isa: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in backends.extension()[0].available_isas():
        monkeypatch.setenv("SPECULATIVE_MAMBA_ISA", isa)
        module, reason = backends.extension.__wrapped__()
        assert module.isa() == isa and reason == f"C++ kernels, instruction set {isa}"
    monkeypatch.setenv("SPECULATIVE_MAMBA_ISA", "sse9")
    with pytest.raises(ValueError, match="instruction set 'sse9' is not available here; choose from: "):
        backends.extension.__wrapped__()


WITHOUT_TORCH = """
import collections, ctypes, importlib.util, sys
sys.modules["torch"] = sys.modules["numpy"] = None
spec = importlib.util.spec_from_file_location("_C", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Pair = ctypes.c_float * 2
class Tensor:
    def __init__(self, *values, dtype="any.float32"):
        self.values, self.dtype = Pair(*values), dtype
    def data_ptr(self): return ctypes.addressof(self.values)
    def stride(self): return 2, 1
Args = collections.namedtuple("Args", "x weight residual gate groups eps x_scale constant_weights")
def norm(weight):
    y, residual = Tensor(), Tensor()
    args = Args(Tensor(3, 4), weight, None, None, 1, 0.0, 1.0, False)
    module.rms_norm(args, 1, activations="any.float32", rows=1, features=2, y=y, residual_out=residual)
    print(list(residual.values), [round(v * 12.5 ** 0.5, 4) for v in y.values])
norm(Tensor(1, 2))
try:
    norm(Tensor(1, 2, dtype="any.float8"))
except ValueError as error:
    print(error)
"""


def test_the_extension_needs_no_torch() -> None:
    result = python(WITHOUT_TORCH.format(path=backends.extension()[0].__file__))
    assert result.stdout.splitlines() == ["[3.0, 4.0] [3.0, 8.0]", "kernels do not know dtype any.float8"], (
        result.stderr
    )


def scan_inputs(channels: int = 256) -> list:
    g = torch.Generator().manual_seed(0)
    x, dt, z = torch.randn(3, 1, 2, channels, generator=g)
    B, C = torch.randn(2, 1, 2, 16, generator=g)
    A, D, bias = -torch.rand(channels, 16, generator=g), x[0, 0], x[0, 1]
    return [x, dt, A, B, C, D, z, bias, torch.randn(1, 3, channels, 16, generator=g), torch.tensor([2]).int()]


def test_several_python_threads_at_once(kernels: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 200, generator=g), torch.randn(150, 200, generator=g)
    inputs, norm = scan_inputs(), torch.randn(64, 600, generator=g)
    ones = torch.ones(600)

    def once() -> list[torch.Tensor]:
        mine = [*inputs[:8], inputs[8].clone(), inputs[9]]
        y = selective_scan_verify(*mine, backend=kernels)
        return [skinny_linear(x, weight, backend=kernels), y, mine[8], *rms_norm(norm, ones, backend=kernels)]

    expected, failures = once(), []

    def worker() -> None:
        torch.set_num_threads(3)  # a setting of each thread
        try:
            for _ in range(60):
                for actual, wanted in zip(once(), expected, strict=True):
                    assert_bitwise_equal(actual, wanted)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not failures, failures[0]


FORK = """
import os, sys, time
import torch
from speculative_mamba.ops import skinny_linear

x, weight = torch.randn(4, 512), torch.randn(512, 512)
def count(): return len(os.listdir("/proc/self/task"))
def use(threads, times):
    torch.set_num_threads(threads)
    for i in range(times):
        assert torch.equal(skinny_linear(x, weight), wanted), "other values"
        time.sleep(0.002 * (i % 3 == 0))  # the workers fall asleep now and then

torch.set_num_threads(1)
wanted = skinny_linear(x, weight)
before = count()
use(3, 10)
assert count() == before + 2, "two workers help"
for pause in (0, 0, 0.0001, 0.0002, 0.01):
    skinny_linear(x, weight)
    time.sleep(pause)
    child = os.fork()
    if child == 0:
        use(2, 10)
        use(4, 10)
        assert count() == 1 + 3, "the child has workers of its own"
        os._exit(0)
    use(3, 5)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_a_forked_child_works_on() -> None:
    result = python(FORK)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("built", "capability", "expected"),
    [
        ("80 90 120+PTX", (8, 0), True),
        ("80 90 120+PTX", (8, 9), True),  # machine code of the same generation
        ("80 90 120+PTX", (7, 5), False),
        ("80 90 120+PTX", (10, 0), False),  # PTX is not for what is older
        ("80 90 120+PTX", (12, 1), True),
        ("80 90 120+PTX", (13, 0), True),  # PTX is for what comes
        ("86 90+PTX", (8, 0), False),
        ("90", (10, 0), False),
    ],
)
def test_which_cards_the_cuda_kernels_run_on(built: str, capability: tuple[int, int], expected: bool) -> None:
    assert backends.runs_on(built, capability) is expected


class FakeCuda:
    """A torch.cuda with one card, and a module of kernels, as far as the probe looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, problem: str = "", capability: tuple[int, int] = (9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        module = types.SimpleNamespace(architectures="80 90+PTX", problem=lambda: problem, version=__version__)
        monkeypatch.setitem(sys.modules, "speculative_mamba._C_cuda", module)

    def reason(self) -> tuple[bool, str]:
        module, reason = backends.cuda_extension.__wrapped__()
        return module is not None, reason


def test_why_the_cuda_kernels_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert backends.cuda_extension.__wrapped__() == (None, "torch sees no CUDA device")
    assert FakeCuda(monkeypatch).reason() == (True, "CUDA kernels for 80 90+PTX")
    assert FakeCuda(monkeypatch, problem="driver too old").reason() == (
        False,
        "the CUDA kernels cannot run: driver too old",
    )
    on, reason = FakeCuda(monkeypatch, capability=(7, 5)).reason()
    assert not on and reason.startswith("the CUDA kernels are built for 80 90+PTX, not for a card (sm_75); ")
    monkeypatch.setitem(sys.modules, "speculative_mamba._C_cuda", None)
    module, reason = backends.cuda_extension.__wrapped__()
    assert module is None and "_C_cuda cannot be loaded" in reason and reason.endswith("CUDA=on pip install -e .")


def test_an_op_on_tensors_that_are_not_aligned_is_refused() -> None:
    memory = bytearray(4 * 8 + 1)
    x = torch.frombuffer(memory, dtype=torch.float32, offset=1).view(2, 4)
    with pytest.raises(ValueError, match=r"^x must lie at a multiple of its 4 bytes per element; copy it"):
        rms_norm(x, torch.ones(4))


LIMITS = """
import os, re, resource
import torch
from speculative_mamba.ops import sample_tokens, skinny_linear
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors

x, weight = torch.randn(4, 512), torch.randn(512, 512)
logits, keys, at = torch.randn(2, 1_000_000), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
sampling = SamplingTensors.from_params([SamplingParams(1.0)] * 2, 1_000_000)
torch.set_num_threads(1)
wanted = skinny_linear(x, weight)
size = 4096 * int(open("/proc/self/statm").read().split()[0])
if os.fork():
    assert os.wait()[1] == 0, "the forked child"
resource.setrlimit(resource.RLIMIT_AS, (size + 2**22, size + 2**22))  # no room for the stack of a thread
torch.set_num_threads(4)
for _ in range(3):
    assert torch.equal(skinny_linear(x, weight), wanted)
try:
    sample_tokens(logits, sampling, keys, at)
except MemoryError:
    os._exit(0)
os._exit(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux enforces RLIMIT_AS")
def test_threads_and_memory_that_the_system_does_not_give() -> None:
    """The work is done by fewer threads, in a forked child too; what needs memory says so."""
    result = python(LIMITS)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mode", ["flush", "subnormals"])
def test_threads_take_the_floating_point_mode_of_the_caller(mode: str, kernels: str) -> None:
    """Halves of the smallest normal number: whether they count as zero is a setting of each thread."""
    x, weight = torch.full((1, 4), 2.0**-64), torch.full((20_000, 4), 2.0**-63)
    try:
        for threads in (3, 3, 1):
            torch.set_flush_denormal(threads == 1)
            torch.set_num_threads(threads)
            skinny_linear(x, weight, backend=kernels)
        for threads in (1, 3):
            torch.set_flush_denormal(mode == "flush")
            torch.set_num_threads(threads)
            y = skinny_linear(x, weight, backend=kernels)
            assert bool(y.count_nonzero() == 0) == (mode == "flush"), f"{threads} threads"
    finally:
        torch.set_flush_denormal(False)


GROUPS = {
    "v2": ("0::/pod/box", {"pod/box/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5),
    "v2, set above": ("0::/pod/box", {"pod/cpu.max": "400000 200000", "pod/box/cpu.max": "max 100000"}, 2.0),
    "v2, the smallest counts": ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
    "v2, inside a container": ("0::/", {"cpu.max": "300000 100000"}, 3.0),
    "v2, path of the host": ("0::/docker/1f", {"cpu.max": "300000 100000"}, 3.0),
    "v1": (
        "4:cpu,cpuacct:/a\n2:memory:/m",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        2.5,
    ),
    "v1, path of the host": (
        "3:cpuset:/\n1:cpu:/docker/1f",
        {"cpu/cpu.cfs_quota_us": "20000", "cpu/cpu.cfs_period_us": "10000"},
        2.0,
    ),
    "v1, none": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "another controller": ("1:memory:/", {"memory/cpu.max": "100000 100000"}, None),
}


@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_the_quota_of_a_container(case: tuple[str, dict, float | None], tmp_path: Path) -> None:
    groups, files, expected = case
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text + "\n")
    assert threads_of.cpu_quota(tmp_path / "cgroup", tmp_path / "mount") == expected
    assert threads_of.cpu_quota(tmp_path / "nothing", tmp_path / "mount") is None


def test_default_threads_respect_the_quota_and_those_that_were_asked_for_do_not(monkeypatch) -> None:
    monkeypatch.setattr(threads_of, "available_cpus", lambda: 2)
    monkeypatch.setattr(threads_of, "_default", 5)
    asked = {}
    for threads in (5, 4, 1):
        torch.set_num_threads(threads)
        asked[threads] = backends.compiled(torch.empty(0))[1]
    assert asked == {5: 2, 4: 4, 1: 1}
    threads_of.set_num_threads(5)
    assert threads_of.num_threads() == 5


def test_cpus_are_those_of_the_affinity_and_the_quota(monkeypatch) -> None:
    monkeypatch.setattr(threads_of.os, "sched_getaffinity", lambda process: {3, 4, 7}, raising=False)
    for quota, expected in ((None, 3), (8.0, 3), (2.9, 2), (0.5, 1)):
        monkeypatch.setattr(threads_of, "cpu_quota", lambda quota=quota: quota)
        assert threads_of.available_cpus.__wrapped__() == expected
