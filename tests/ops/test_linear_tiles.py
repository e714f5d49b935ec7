"""skinny_linear by tiles, for weights in bfloat16. What every instruction set does is in ``test_skinny_linear.py``."""

import subprocess
import sys

import pytest
import torch

from speculative_mamba.ops import backend as backends
from speculative_mamba.ops import skinny_linear
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

MODULE = backends.extension()[0]
TILED = [isa for isa in (*MODULE.available_isas(), *MODULE.emulated_isas()) if isa.startswith("amx")] if MODULE else []
FUSED = [isa for isa in MODULE.available_isas() if isa not in ("amx", "baseline")] if MODULE else []
pytestmark = pytest.mark.skipif(not TILED or not FUSED, reason="tiles are emulated by AVX2")
tiled = pytest.mark.parametrize("isa", TILED[:1] or ["none"])
# Few rows and many, alone in their tile and not; edges of tiles, of panels and of groups in every direction.
FEW = [
    (1, 512, 32), (5, 525, 37), (6, 2560, 48), (10, 545, 5), (16, 640, 100), (17, 543, 16), (5, 64, 130), (1, 32, 70),
    (1, 192, 100), (5, 384, 44),
]  # fmt: skip
SHAPES = [*FEW, (40, 608, 33), (70, 715, 81), (33, 64, 300), (50, 32, 49)]


def by(isa: str, x: torch.Tensor, weight: torch.Tensor, **options: object) -> torch.Tensor:
    before = MODULE.isa()
    MODULE.select_isa(isa)
    try:
        return skinny_linear(x, weight, backend="cpu", **options)
    finally:
        MODULE.select_isa(before)


def make(rows: int, features: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=g), torch.randn(outputs, features, generator=g).bfloat16()


def with_special_values(rows: int, features: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every kind of row of x meets every kind of row of W: subnormal, tiny, huge, infinite, NaN, zero."""
    x, weight = make(rows, features, outputs)
    for matrix in (x, weight):
        for row, scale in enumerate((1, 1e-39, 1e-36, 1e30, 1e-20, 1, 1, 1, 0, 1)):
            matrix[row::10] *= scale
        matrix[5::10, 3] = torch.inf
        matrix[6::10, 2] = torch.nan
        matrix[7::10, ::2] *= 1e-38
        matrix[9::10, 1] = -3.3e38
    return x, weight


@pytest.mark.skipif("amx" not in TILED, reason="needs AMX")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_emulation_gives_the_bits_of_the_processor(shape: tuple[int, int, int]) -> None:
    for x, weight in (make(*shape), with_special_values(*shape)):
        assert_bitwise_equal(by("amx_emulated", x, weight), by("amx", x, weight))


@tiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_special_values_are_those_of_other_instruction_sets(shape: tuple[int, int, int], isa: str) -> None:
    """Catches: infinity times the zero that is a part of x, a subnormal number that counts as zero."""
    x, weight = with_special_values(*shape)
    actual, expected = by(isa, x, weight), by(FUSED[0], x, weight)
    assert_bitwise_equal(actual.isnan(), expected.isnan(), "NaN")
    assert_bitwise_equal(actual.isinf(), expected.isinf(), "infinities")
    finite = expected.isfinite()
    size = x.double().abs() @ weight.double().abs().T
    error = (actual.double() - expected.double()).abs()
    assert (error <= 1e-6 * size + 1e-43)[finite].all()


@tiled
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_a_subnormal_input_counts_for_a_large_weight(rows: int, isa: str) -> None:
    """Catches: a part of x that is lost beside a result which is small for other reasons."""
    x, weight = torch.zeros(rows, 512), torch.zeros(20, 512, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 2.0**-130, 1
    weight[:, 0], weight[:, 1] = 2.0**40, 2.0**-80
    assert_bitwise_equal(by(isa, x, weight), by(FUSED[0], x, weight))


@tiled
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_the_error_is_within_twice_that_of_pytorch(rows: int, isa: str) -> None:
    """Catches: a part of x too few."""
    x, weight = make(rows, 1024, 50)
    for large in (1.0, 1000.0):  # of some features, beside which the others lose bits
        x[:, ::32] *= large
        y = by(isa, x, weight)
        assert_accurate(y, x @ weight.float().T, x.double() @ weight.double().T, what=f"{large} times")


@tiled
@pytest.mark.parametrize("shape", [(70, 1100, 700), (100, 1100, 40), (49, 64, 700)], ids=str)
def test_many_rows_are_the_same_alone_and_on_any_number_of_threads(shape: tuple[int, int, int], isa: str) -> None:
    """Catches: a block of packed weights that another thread or the next block writes over; rows of x that threads
    share where W has few; sums whose order is not that of a row alone."""
    x, weight = make(*shape)
    expected = torch.cat([by(isa, row[None], weight) for row in x])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_bitwise_equal(by(isa, x, weight), expected, f"{threads} threads")


@tiled
def test_bias_and_scale(isa: str) -> None:
    x, weight = make(40, 600, 33)
    bias = torch.arange(33.0)
    assert_bitwise_equal(by(isa, x, weight, bias=bias, y_scale=0.3), by(isa, x, weight) * 0.3 + bias)


REFUSED = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
stack = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(stack), 0, 4096)), None) == 0
from speculative_mamba import cli
sys.exit(cli.main(["info"]))
"""


@pytest.mark.skipif("amx" not in TILED, reason="needs AMX")
def test_a_kernel_that_refuses_is_obeyed_and_the_fact_told() -> None:
    """Linux gives no tiles to a process one of whose threads has a signal stack too small for them."""
    result = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr
    sets = next(line for line in result.stdout.splitlines() if line.startswith("instruction sets"))
    assert "amx" not in sets and "(in use: avx512_vnni)" in sets
    assert "AMX               refused by the kernel: " in result.stdout
