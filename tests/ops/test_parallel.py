"""The thread pool of the CPU kernels, compiled alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_chunk_is_computed_once(tmp_path: Path) -> None:
    """Catches: a chunk that two threads claim, one that nobody does, jobs of more chunks than a ticket counts."""
    sources = HERE / "parallel" / "main.cpp", HERE.parents[1] / "csrc" / "cpu" / "parallel.cpp"
    command = [COMPILER, "-std=c++17", "-O1", "-pthread", *sources, "-o", tmp_path / "pool"]
    subprocess.run(command, check=True, timeout=120)
    result = subprocess.run([tmp_path / "pool"], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
