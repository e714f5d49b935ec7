"""Builds the CUDA kernels for the CPU: a module like ``_C_cuda`` that runs them through cuda_shim/."""

import functools
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "cuda_shim"
DTYPE = ROOT / "csrc" / "dtype.cpp"
CUDA = ROOT / "csrc" / "cuda"


@functools.cache
def built_shim() -> ModuleType:
    """The module, built once."""
    folder = Path(tempfile.mkdtemp(prefix="cuda-on-cpu-"))
    target = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    pybind11 = pytest.importorskip("pybind11")
    options = ["-fvisibility=hidden"]
    options += [f"-I{include}" for include in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = [ROOT / "csrc" / "bindings_cuda.cpp", SHIM / "kernels.cpp", *sorted(CUDA.glob("*.cu"))]
    compile_on_shim(sources, target, options)
    spec = importlib.util.spec_from_file_location("_C_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(folder)
    for name in ("selective_scan", "ssd"):
        setattr(module, name, skipping_large_states(getattr(module, name)))
    return module


def skipping_large_states(kernel: Callable[..., None]) -> Callable[..., None]:
    """Tests of more states than a kernel takes, which it says itself, are skipped."""

    @functools.wraps(kernel)
    def call(*arguments: object) -> None:
        try:
            kernel(*arguments)
        except ValueError as error:
            if "takes up to" not in str(error):
                raise
            pytest.skip(str(error))

    return call


def compile_on_shim(sources: list[Path], target: Path, options: list[str]) -> None:
    """A shared library of CUDA sources for the CPU; the test is skipped where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-U_FORTIFY_SOURCE",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    command += ["-shared", "-fPIC", f"-I{SHIM}", f"-I{CUDA}", *options, "-x", "c++", *map(str, [DTYPE, *sources])]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
