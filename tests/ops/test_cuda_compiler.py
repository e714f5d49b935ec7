"""What nvcc makes of every CUDA kernel, for every architecture: no warning, spill or stack frame, and no more registers
than stated here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from shim import CUDA

# The most that any instantiation of a file's kernels uses, on any architecture: of 64 for each of 128 threads, eight
# blocks fit on a multiprocessor.
REGISTERS = {
    "attention_verify": 105, "causal_conv1d_verify": 128, "commit_tokens": 48, "gated_silu": 27, "rms_norm": 157,
    "sample_tokens": 100, "selective_scan_verify": 128, "skinny_linear": 240, "speculative_accept": 110,
    "ssd_verify": 167,
}  # fmt: skip
OLDEST = 80
FILES = sorted(CUDA.glob("*.cu"), key=lambda path: path.name)


def architectures() -> list[int]:
    """From sm_80 on, those that the toolkit itself lists."""
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [number for number in map(int, re.findall(r"compute_(\d+)\b", listed)) if number >= OLDEST]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_registers_and_spills(file: Path, tmp_path: Path) -> None:
    wanted = architectures()
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in wanted]
    command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", "--threads=0", "-Xptxas=-v", *codes, "-c", str(file)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    assert {int(number) for number in re.findall(r"for 'sm_(\d+)'", done.stderr)} == set(wanted)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == len(frames) > 0
    assert set(frames) == {("0", "0", "0")}, "stack frame or spills"
    assert max(registers) <= REGISTERS[file.stem]
