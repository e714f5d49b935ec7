"""What Triton makes of every kernel, for several architectures and without a GPU: no spill or stack frame, no more
registers than stated here, and no multiply-add that the source does not ask for."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import triton_launches

# The most that any call of ``triton_launches`` uses, on any architecture. In speculative_accept that is ``_list`` on
# sm_90. It has eight warps, of which one program fits on a multiprocessor with any number from 129 to 255. With top-k,
# top-p and the rest as scalars of the launch and not read for each row, ptxas takes 191 for the same operations.
REGISTERS = {
    "attention_verify": 255, "skinny_linear": 128, "speculative_accept": 206,
    "causal_conv1d_verify": 56, "commit_tokens": 40, "mlp_activation": 40, "rms_norm": 64, "selective_scan_verify": 64,
    "ssd_verify": 64, "expert_linear": 186, "select_experts": 64, "embed_tokens": 40,
}  # fmt: skip
ARCHITECTURES, ALL_ARCHITECTURES = (90,), (80, 90, 100, 120)  # all with --full, and every call instead of every second
OPS = Path(__file__).parents[2] / "speculative_mamba" / "ops"


def test_every_kernel_is_compiled() -> None:
    assert {path.parent.name for path in OPS.glob("*/triton.py")} == set(REGISTERS) == set(triton_launches.CALLS)


@pytest.fixture(scope="module")
def architectures(pytestconfig: pytest.Config) -> tuple[int, ...]:
    return ALL_ARCHITECTURES if pytestconfig.getoption("full") else ARCHITECTURES


@pytest.fixture(scope="module")
def step(architectures: tuple[int, ...]) -> int:
    return 1 if architectures == ALL_ARCHITECTURES else 2


@pytest.fixture(scope="module")
def compiler(
    architectures: tuple[int, ...], step: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen]:
    """A process without the interpreter, which imports torch once for all ops."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(OPS.parents[1])}
    command = [sys.executable, triton_launches.__file__, *map(str, [step, *architectures])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("name", REGISTERS)
def test_registers_and_spills(name: str, architectures: tuple[int, ...], step: int, compiler: subprocess.Popen) -> None:
    """Catches: `enable_fp_fusion`; registers left to ptxas."""
    compiler.stdin.write(f"{name}\n")
    answer = compiler.stdout.readline()
    assert answer, "the compiler broke off"
    kernels = json.loads(answer)
    assert len(kernels) >= len(architectures) * len(triton_launches.CALLS[name][::step])
    for kernel in kernels:
        what = f"{kernel['kernel']} of {kernel['call']} for sm_{kernel['architecture']}"
        assert (kernel["STACK"], kernel["LOCAL"]) == (0, 0), f"{what}: stack frame or spills"
        assert kernel["REG"] <= REGISTERS[name], what
        assert not kernel["contractible"], f"{what}: multiply-adds may be fused"
