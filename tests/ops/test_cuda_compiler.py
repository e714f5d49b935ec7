"""What nvcc made of every CUDA kernel of this installation, for every architecture that it was built for: no spill or
stack frame, and no more registers than stated here."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from shim import CUDA

# The most that any instantiation of a file's kernels uses, on any architecture: of 64 for each of 128 threads, eight
# blocks fit on a multiprocessor; of 128 for each of 256, two, which is what attention's shared memory allows.
REGISTERS = {
    "attention_verify": 128, "causal_conv1d_verify": 128, "commit_tokens": 48, "mlp_activation": 27, "rms_norm": 157,
    "selective_scan_verify": 128, "skinny_linear": 240, "speculative_accept": 110,
    "ssd_verify": 167, "expert_linear": 158, "select_experts": 75, "embed_tokens": 40,
}  # fmt: skip
FUNCTION = re.compile(r"Function \S+?_\d+_(\w+)_cu_[0-9a-f]{8}(\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@pytest.fixture(scope="module")
def listing() -> str:
    module = importlib.util.find_spec("speculative_mamba._C_cuda")
    if module is None:
        pytest.skip("the CUDA kernels are not built")
    if importlib.util.find_spec("triton") is None and not shutil.which("cuobjdump"):
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")
    library = Path(module.origin)
    sources = [path for path in (*CUDA.iterdir(), *CUDA.parent.glob("*.h")) if path.suffix in (".cu", ".cuh", ".h")]
    newer = [path.name for path in sources if path.stat().st_mtime > library.stat().st_mtime]
    assert not newer, f"the CUDA kernels are older than {', '.join(newer)}: pip install -e . builds them anew"
    program = shutil.which("cuobjdump")
    if program is None:
        from triton.knobs import nvidia

        program = nvidia.cuobjdump.path
    done = subprocess.run([program, "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True)
    return done.stdout


def test_every_kernel_is_listed(listing: str) -> None:
    assert {path.stem for path in CUDA.glob("*.cu")} == set(REGISTERS)
    assert len(FUNCTION.findall(listing)) == listing.count("Function ") > 0


@pytest.mark.parametrize("file", REGISTERS)
def test_registers_and_spills(file: str, listing: str) -> None:
    """Catches: two quadruples of states in a lane."""
    for code in listing.split("Fatbin elf code:"):
        architecture = re.search(r"arch = (\w+)", code)
        for source, kernel, registers, stack, local in FUNCTION.findall(code):
            if source != file:
                continue
            what = f"{kernel} for {architecture[1]}"
            assert (stack, local) == ("0", "0"), f"{what}: stack frame or spills"
            assert int(registers) <= REGISTERS[file], what
