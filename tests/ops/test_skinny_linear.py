"""A few rows times a weight matrix. What lies around x and the weight is NaN."""

import pytest
import torch

from speculative_mamba.ops import skinny_linear
from speculative_mamba.ops.skinny_linear import reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

BASE = {"rows": 5, "in_features": 77, "out_features": 37, "dtype": torch.float32, "contiguous": False}
CHANGES = [
    {},
    {"rows": 1},
    {"rows": 2},
    {"rows": 6},
    {"rows": 7},
    {"rows": 13},
    {"rows": 64},
    {"rows": 65},
    {"in_features": 1},
    {"in_features": 15},
    {"in_features": 16},
    {"in_features": 33},
    {"in_features": 1536},
    {"out_features": 1},
    {"out_features": 3},
    {"out_features": 64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"contiguous": True},
    {"contiguous": True, "in_features": 768, "dtype": torch.bfloat16},
]
table = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make(change: dict | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) and weight (N, K), both inside wider matrices of NaN unless contiguous."""
    c = {**BASE, **(change or {})}
    g = torch.Generator().manual_seed(seed)
    margin = 0 if c["contiguous"] else 3

    def matrix(rows: int, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.full((rows, c["in_features"] + 2 * margin), torch.nan, dtype=dtype)
        inner = wide[:, margin : margin + c["in_features"]]
        inner[:] = torch.randn(rows, c["in_features"], generator=g)
        return inner

    return matrix(c["rows"], torch.float32), matrix(c["out_features"], c["dtype"])


@table
def test_error_is_within_twice_that_of_pytorch(change: dict, cpu: str) -> None:
    x, weight = make(change)
    y_single = skinny_linear(x, weight, backend="reference")
    assert_accurate(skinny_linear(x, weight, backend=cpu), y_single, reference.skinny_linear(x.double(), weight))


@table
def test_a_row_alone_has_the_same_bits(change: dict, backend: str) -> None:
    x, weight = make(change)
    y = skinny_linear(x, weight, backend=backend)
    assert y.is_contiguous() and y.dtype == torch.float32
    alone = [skinny_linear(x[m : m + 1], weight, backend=backend) for m in range(len(x))]
    assert_bitwise_equal(y, torch.cat(alone), "y")


@dtypes
def test_a_row_is_the_same_for_every_number_of_rows(dtype: torch.dtype, cpu: str) -> None:
    x, weight = make({"rows": 64, "in_features": 203, "out_features": 37, "dtype": dtype})
    whole = skinny_linear(x, weight, backend=cpu)
    for count in range(1, 65):
        assert_bitwise_equal(skinny_linear(x[:count], weight, backend=cpu), whole[:count], f"first {count} rows")
        assert_bitwise_equal(skinny_linear(x[-count:], weight, backend=cpu), whole[-count:], f"last {count} rows")


def test_a_row_does_not_see_its_neighbours(cpu: str) -> None:
    x, weight = make({"rows": 16})
    expected = skinny_linear(x, weight, backend=cpu)
    for m in range(16):
        others = torch.full((16, 77), torch.nan)
        others[m] = x[m]
        y = skinny_linear(others, weight, backend=cpu)
        assert_bitwise_equal(y[m], expected[m], f"row {m} among NaN")
        assert y[torch.arange(16) != m].isnan().all(), "NaN goes in, NaN comes out"


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_threads_do_not_change_a_bit(rows: int, dtype: torch.dtype, cpu: str) -> None:
    # 1.2 million weights: many chunks for every number of threads below.
    x, weight = make({"rows": rows, "in_features": 1537, "out_features": 801, "dtype": dtype})
    torch.set_num_threads(1)
    expected = skinny_linear(x, weight, backend=cpu)
    for threads in (2, 4, 4, 3, 2, 4):
        torch.set_num_threads(threads)
        assert_bitwise_equal(skinny_linear(x, weight, backend=cpu), expected, f"{threads} threads")


@dtypes
def test_a_nan_weight_reaches_its_output_only(dtype: torch.dtype, backend: str) -> None:
    x, weight = make({"dtype": dtype})
    weight[7, 76] = torch.nan
    expected = torch.zeros(5, 37, dtype=torch.bool)
    expected[:, 7] = True
    assert_bitwise_equal(skinny_linear(x, weight, backend=backend).isnan(), expected, "NaN")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_narrow_dtype_is_read_exactly(dtype: torch.dtype, cpu: str) -> None:
    weight = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)[:, None]
    weight = weight[weight[:, 0].isfinite()]  # subnormals and both zeros included
    y = skinny_linear(torch.ones(1, 1), weight, backend=cpu)
    assert_bitwise_equal(y[0], weight[:, 0].float(), "weights")


def test_inputs_are_not_modified(backend: str) -> None:
    x, weight = make()
    before = [t._base.clone() for t in (x, weight)]
    skinny_linear(x, weight, backend=backend)
    for t, snapshot in zip((x, weight), before, strict=True):
        assert_bitwise_equal(t._base, snapshot)


def test_nothing_times_nothing(backend: str) -> None:
    assert skinny_linear(torch.ones(0, 5), torch.ones(3, 5), backend=backend).shape == (0, 3)
    assert skinny_linear(torch.ones(2, 5), torch.ones(0, 5), backend=backend).shape == (2, 0)
    assert_bitwise_equal(skinny_linear(torch.ones(2, 0), torch.ones(3, 0), backend=backend), torch.zeros(2, 3))


@dtypes
def test_instruction_sets_with_fused_multiply_add_agree(
    dtype: torch.dtype, fused_isas: list[str], select_isa: object
) -> None:
    for change in CHANGES:
        x, weight = make({**change, "dtype": dtype})
        results = []
        for isa in fused_isas:
            select_isa(isa)
            results.append(skinny_linear(x, weight, backend="cpu"))
        for y in results[1:]:
            assert_bitwise_equal(y, results[0], f"y, {change}")
