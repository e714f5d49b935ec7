"""What setup.py builds, and what it says: with stand-ins for cmake and nvcc, so that nothing is compiled."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CMAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$@" in *csrc/cuda*|*_C_cuda*) exit ${CUDA_FAILS:-0};; esac
"""
NVCC = """#!/bin/sh
for number in 75 80 86 90 100 103 120 121; do echo compute_$number; done
"""


class Build:
    """Runs setup.py's build_ext in a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        self.bin.mkdir()
        shutil.copy(ROOT / "setup.py", folder)
        (folder / "speculative_mamba").mkdir()
        self.tool("cmake", CMAKE)

    def tool(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def __call__(self, **environment: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if "CUDA" not in name}
        clean |= {"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls), **environment}
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        return subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True, timeout=90)

    def configured(self) -> list[str]:
        """The calls of cmake that configure."""
        return [line for line in self.calls.read_text().splitlines() if line.startswith("-G")]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    pytest.importorskip("pybind11")
    return Build(tmp_path)


@pytest.mark.skipif(any(map(os.path.exists, ("/usr/bin/nvcc", "/bin/nvcc"))), reason="nvcc is always found here")
class TestWithoutNvcc:
    def test_auto_builds_the_cpu_kernels(self, build: Build) -> None:
        result = build()
        assert result.returncode == 0, result.stderr
        assert len(build.configured()) == 1 and "csrc/cuda" not in build.configured()[0]

    def test_on_says_what_is_missing(self, build: Build) -> None:
        result = build(SPECULATIVE_MAMBA_CUDA="on")
        assert result.returncode != 0
        line = "speculative_mamba: the CUDA kernels were not built: no nvcc found; put it on the PATH or set CUDA_HOME"
        assert result.stderr.splitlines()[-1] == line


def test_the_toolkit_decides_the_architectures(build: Build) -> None:
    build.tool("nvcc", NVCC)
    assert build().returncode == 0
    _, cuda = build.configured()
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;100-real;120 " in cuda
    assert cuda.endswith("-DSM_CUDA_ARCHITECTURES=80 90 100 120+PTX")


def test_architectures_can_be_chosen(build: Build) -> None:
    build.tool("nvcc", NVCC)
    assert build(SPECULATIVE_MAMBA_CUDA_ARCHS="90; 86").returncode == 0
    assert "-DCMAKE_CUDA_ARCHITECTURES=86-real;90 " in build.configured()[1]


def test_an_unknown_architecture_is_refused(build: Build) -> None:
    build.tool("nvcc", NVCC)
    result = build(SPECULATIVE_MAMBA_CUDA="on", SPECULATIVE_MAMBA_CUDA_ARCHS="sm_90")
    assert result.returncode != 0
    assert "this nvcc knows no 'sm_90'; choose from: 75; 80; 86; 90" in result.stderr.splitlines()[-1]


def test_off_never_looks(build: Build) -> None:
    build.tool("nvcc", NVCC)
    assert build(SPECULATIVE_MAMBA_CUDA="off").returncode == 0
    assert len(build.configured()) == 1


def test_in_auto_a_failure_leaves_the_cpu_kernels(build: Build) -> None:
    build.tool("nvcc", NVCC)
    result = build(CUDA_FAILS="1")
    assert result.returncode == 0
    assert "the CUDA kernels were not built: cmake failed; its messages are above" in result.stderr
    assert "the CPU kernels are not affected" in result.stderr
    result = build(CUDA_FAILS="1", SPECULATIVE_MAMBA_CUDA="on")
    assert result.returncode != 0 and "the CUDA kernels were not built" in result.stderr.splitlines()[-1]


def test_an_unknown_mode_is_refused(build: Build) -> None:
    result = build(SPECULATIVE_MAMBA_CUDA="yes")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == "SPECULATIVE_MAMBA_CUDA must be one of auto, on, off, got 'yes'"


@pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("SPECULATIVE_MAMBA_CUDA") == "off", reason="needs nvcc"
)
def test_where_there_is_nvcc_the_cuda_kernels_are_built() -> None:
    """The module needs no GPU to be loaded; without one it says why its kernels cannot run."""
    module = importlib.import_module("speculative_mamba._C_cuda")
    assert module.architectures.endswith("+PTX") and callable(module.selective_scan)
    assert bool(module.problem()) is not torch.cuda.is_available()
