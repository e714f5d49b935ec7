"""Builds the CUDA kernels for the CPU: a module like ``_C_cuda`` that runs them through cuda_shim/."""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "cuda_shim"
SHARED = (SHIM / "machine.cpp", ROOT / "csrc" / "dtype.cpp")
CUDA = ROOT / "csrc" / "cuda"


@functools.cache
def built_shim() -> ModuleType:
    """The module, built once for all processes and until a source changes."""
    pybind11 = pytest.importorskip("pybind11")
    options = ["-fvisibility=hidden", '-DSM_VERSION="of the shim"']
    options += [f"-I{include}" for include in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = [ROOT / "csrc" / "bindings_cuda.cpp", SHIM / "kernels.cpp", *sorted(CUDA.glob("*.cu"))]
    read = sorted(path for folder in (SHIM, CUDA, CUDA.parent) for path in folder.iterdir() if path.is_file())
    digest = hashlib.sha256("".join([*options, *(path.read_text() for path in read)]).encode()).hexdigest()
    folder = ROOT / ".pytest_cache" / f"cuda-on-cpu-{digest[:16]}"
    target = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_on_shim(sources, folder / "new.so", options)
            (folder / "new.so").rename(target)
    spec = importlib.util.spec_from_file_location("_C_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def synchronize() -> None:
    """As after waiting for a GPU: what its kernels wrote until now is theirs no more."""
    ctypes.CDLL(built_shim().__file__).synchronize()


def compile_on_shim(sources: list[Path], target: Path, options: list[str]) -> None:
    """A shared library of CUDA sources for the CPU; the test is skipped where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++17", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{CUDA}", *options]

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    # Kernels run for an instant and take long to optimise; the machine runs all the time.
    objects = {target.with_name(f"{source.stem}.o"): source for source in (*SHARED, *sources)}
    levels = {made: "-O2" if source in SHARED else "-O0" for made, source in objects.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda made: run(levels[made], "-c", "-x", "c++", objects[made], "-o", made), objects))
    run("-shared", *objects, "-o", target)
