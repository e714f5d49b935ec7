"""The instructions of AMX against their emulation, with which machines without them test the kernels."""

import os
import subprocess
from pathlib import Path

import pytest

from speculative_mamba.ops import backend as backends

HERE = Path(__file__).parent / "tiles"
MODULE = backends.extension()[0]


@pytest.mark.skipif(MODULE is None or "amx" not in MODULE.available_isas(), reason="needs AMX")
def test_the_emulation_gives_the_bits_of_the_instructions(tmp_path: Path) -> None:
    """Also of subnormal numbers, infinities and NaN, in every float mode of the thread.

    Catches: another order of a sum, subnormal numbers kept, rounding by MXCSR, sums of bytes that saturate.
    """
    build = [os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-ffp-contract=off", "-mavx2", "-mfma"]
    amx = ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]
    objects = []
    for isa, options in (("hardware", amx), ("emulated", [])):
        objects.append(tmp_path / f"{isa}.o")
        command = [*build, *options, f"-DSM_ISA={isa}", "-c", HERE / "product.cpp", "-o", objects[-1]]
        subprocess.run(command, check=True, timeout=120)
    subprocess.run([*build, HERE / "main.cpp", *objects, "-o", tmp_path / "compare"], check=True, timeout=120)
    result = subprocess.run([tmp_path / "compare"], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "equal\n"), result.stdout + result.stderr
