"""A few rows times a weight matrix. What lies around x and the weight is NaN, around int8 values -128."""

import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR

from speculative_mamba.ops import skinny_linear
from speculative_mamba.ops.int8 import Int8Weight, quantised
from speculative_mamba.ops.skinny_linear import SkinnyLinearArgs, reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)


def make(change: dict | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | Int8Weight]:
    """x (M, K) and weight (N, K), both inside wider matrices of NaN unless contiguous.

    Rows of an int8 weight differ in size, so that the scale of another row would show.
    """
    c = {"contiguous": False, **LINEAR.base, **(change or {})}
    g = torch.Generator().manual_seed(seed)
    margin = 0 if c["contiguous"] else 3

    def matrix(rows: int, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.full((rows, c["in_features"] + 2 * margin), torch.nan, dtype=dtype)
        inner = wide[:, margin : margin + c["in_features"]]
        inner[:] = torch.randn(rows, c["in_features"], generator=g)
        return inner

    x = matrix(c["rows"], torch.float32)
    if c["dtype"] is not torch.int8:
        return x, matrix(c["out_features"], c["dtype"])
    weight = quantised(matrix(c["out_features"], torch.float32) * (1 + torch.rand(c["out_features"], 1, generator=g)))
    values, scale = (F.pad(t, (margin, margin), value=v) for t, v in ((weight.values, -128), (weight.scale, torch.nan)))
    inside = slice(margin, values.shape[1] - margin), slice(margin, len(scale) - margin)
    return x, Int8Weight(values[:, inside[0]], scale[inside[1]])


def specified(x: torch.Tensor, weight: torch.Tensor | Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """By the reference, in the dtype of x."""
    return reference.skinny_linear(SkinnyLinearArgs(x, weight, bias, 1.0, x.dtype, constant_weights=False))


@dtypes
def test_a_row_is_the_same_for_every_number_of_rows(dtype: torch.dtype, kernels: str) -> None:
    """Catches: a sum in an order that depends on the number of rows."""
    x, weight = make({"rows": 64, "in_features": 203, "out_features": 37, "dtype": dtype})
    whole = skinny_linear(x, weight, backend=kernels)
    for count in range(1, 65) if kernels == "cpu" else (1, 2, 7, 8, 9, 15, 16, 17, 33, 48, 63):
        assert_bitwise_equal(skinny_linear(x[:count], weight, backend=kernels), whole[:count], f"first {count} rows")
        assert_bitwise_equal(skinny_linear(x[-count:], weight, backend=kernels), whole[-count:], f"last {count} rows")


def test_a_row_does_not_see_its_neighbours(kernels: str) -> None:
    x, weight = make({"rows": 16})
    expected = skinny_linear(x, weight, backend=kernels)
    for m in range(16):
        others = torch.full((16, 77), torch.nan)
        others[m] = x[m]
        y = skinny_linear(others, weight, backend=kernels)
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
    if dtype is torch.int8:
        weight.scale[7] = torch.nan
    else:
        weight[7, 76] = torch.nan
    expected = torch.zeros(5, 37, dtype=torch.bool)
    expected[:, 7] = True
    assert_bitwise_equal(skinny_linear(x, weight, backend=backend).isnan(), expected, "NaN")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_narrow_dtype_is_read_exactly(dtype: torch.dtype, kernels: str) -> None:
    weight = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)[:, None]
    weight = weight[weight[:, 0].isfinite()]  # subnormals and both zeros included
    weight = weight.view(-1, 16)
    y = skinny_linear(torch.eye(16), weight, backend=kernels)
    assert_bitwise_equal(y.T, weight.float() + 0.0, "weights")  # added to zeros, -0 becomes 0


def test_every_value_of_int8_is_read_exactly(kernels: str) -> None:
    """Each of them in each of the sixteen lanes, and in the rest after them."""
    numbers = torch.arange(-128, 128, dtype=torch.int8)
    scale = torch.rand(len(numbers)) + 0.5
    for k in range(17):
        values = torch.zeros(len(numbers), 17, dtype=torch.int8)
        values[:, k] = numbers
        y = skinny_linear(torch.eye(17), Int8Weight(values, scale), backend=kernels)
        assert_bitwise_equal(y[k], numbers * scale, f"feature {k}")


def test_extreme_values_of_int8(backend: str) -> None:
    """Rows of zeros, of subnormal and of large numbers; x from the smallest to large."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 77, generator=g) * torch.tensor([1e-38, 1e-20, 1.0, 1e10, 1e20, 1e30])[:, None]
    weight = torch.randn(37, 77, generator=g) * torch.logspace(-44, 6, 37)[:, None]
    weight[3], weight[36] = 0, 0
    weight = quantised(weight)
    y = skinny_linear(x, weight, backend=backend)
    assert (y[:, 3] == 0).all() and (y[:, 36] == 0).all()
    size = x.double().abs() @ weight.values.double().abs().T * weight.scale.double()
    error = (y.double() - specified(x.double(), weight)).abs()
    assert (error <= 1e-6 * size + 1e-38).all()


@dtypes
def test_inputs_are_not_modified(dtype: torch.dtype, backend: str) -> None:
    x, weight = make({"dtype": dtype})
    tensors = [x, weight.values, weight.scale] if dtype is torch.int8 else [x, weight]
    before = [t._base.clone() for t in tensors]
    skinny_linear(x, weight, backend=backend)
    for t, snapshot in zip(tensors, before, strict=True):
        assert_bitwise_equal(t._base, snapshot)


def test_nothing_times_nothing(backend: str) -> None:
    assert skinny_linear(torch.ones(0, 5), torch.ones(3, 5), backend=backend).shape == (0, 3)
    assert skinny_linear(torch.ones(2, 5), torch.ones(0, 5), backend=backend).shape == (2, 0)
    assert_bitwise_equal(skinny_linear(torch.ones(2, 0), torch.ones(3, 0), backend=backend), torch.zeros(2, 3))
    none = quantised(torch.ones(3, 0))
    assert_bitwise_equal(skinny_linear(torch.ones(2, 0), none, backend=backend), torch.zeros(2, 3))


@pytest.mark.parametrize("change", [{}, {"rows": 64}, {"out_features": 1}, {"dtype": torch.int8}], ids=str)
def test_scale_and_bias_come_to_the_finished_sum(change: dict, backend: str) -> None:
    x, weight = make(change)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(7))
    y = skinny_linear(x, weight, bias, backend=backend)
    sums = skinny_linear(x, weight, backend=backend)
    assert_bitwise_equal(y, sums + bias)
    assert_bitwise_equal(skinny_linear(x, weight, bias, y_scale=0.3, backend=backend), sums * 0.3 + bias, "scaled")


@pytest.mark.parametrize(
    "bias",
    [
        torch.zeros(36),
        torch.zeros(1, 37),
        torch.zeros(37).double(),
        torch.zeros(74)[::2],
        torch.zeros(37, device="meta"),
    ],
    ids=["shape", "matrix", "dtype", "stride", "device"],
)
def test_a_bias_that_does_not_fit(bias: torch.Tensor, backend: str) -> None:
    x, weight = make()
    with pytest.raises(ValueError, match=r"^bias "):
        skinny_linear(x, weight, bias, backend=backend)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "features", "outputs"), [(1, 1, 1), (5, 333, 50), (9, 700, 20), (40, 65, 17)])
def test_activations_of_16_bits(
    rows: int, features: int, outputs: int, dtype: torch.dtype, weight_dtype: torch.dtype, gpu_kernels: str
) -> None:
    """The result may stay in float32, as logits do: then nothing is rounded. A row is the same with any others.

    Catches: fragments swapped; warps left out for few rows; no barrier between tiles; rows of the weight beyond the
    last.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=g).to(dtype)
    weight, bias = torch.randn(outputs, features, generator=g), torch.randn(outputs, generator=g)
    weight = quantised(weight) if weight_dtype is torch.int8 else weight.to(weight_dtype)
    exact = specified(x.double(), weight, bias)
    y = skinny_linear(x, weight, bias, out_dtype=torch.float32, backend=gpu_kernels)
    assert_accurate(y, specified(x.float(), weight, bias), exact)
    assert_bitwise_equal(skinny_linear(x, weight, bias, backend=gpu_kernels), y.to(dtype), "rounded")
    sums = skinny_linear(x, weight, out_dtype=torch.float32, backend=gpu_kernels)
    scaled = skinny_linear(x, weight, bias, y_scale=0.3, out_dtype=torch.float32, backend=gpu_kernels)
    assert_bitwise_equal(scaled, sums * 0.3 + bias, "scaled")
    for first in range(0, rows, 3):
        alone = skinny_linear(x[first : first + 1], weight, bias, out_dtype=torch.float32, backend=gpu_kernels)
        assert_bitwise_equal(alone, y[first : first + 1], f"row {first}")


def aligned(matrix: torch.Tensor, filling: float) -> torch.Tensor:
    """The same inside a wider matrix, whose rows begin at multiples of 16 bytes."""
    columns = matrix.shape[1]
    return F.pad(matrix, (0, -columns % 16), value=filling)[:, :columns]


@pytest.mark.parametrize("int8", [False, True], ids=["same dtype", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("features", "outputs"), [(1, 1), (7, 3), (48, 96), (160, 201), (333, 50), (512, 5), (1104, 7), (1552, 100)]
)
def test_a_row_of_16_bits_is_the_same_among_any_others(
    features: int, outputs: int, dtype: torch.dtype, int8: bool, gpu_kernels: str
) -> None:
    """And wherever it lies; the weight is aligned as a whole model's, whatever its number of features.

    Catches: x of a row that is none.
    """
    g = torch.Generator().manual_seed(0)
    x = aligned(torch.randn(67, features, generator=g).to(dtype), torch.nan)
    weight, bias = torch.randn(outputs, features, generator=g), torch.randn(outputs, generator=g)
    if int8:
        weight = quantised(weight)
        weight = Int8Weight(aligned(weight.values, -128), weight.scale)
    else:
        weight = aligned(weight.to(dtype), torch.nan)

    def run(x: torch.Tensor) -> torch.Tensor:
        return skinny_linear(x, weight, bias, out_dtype=torch.float32, backend=gpu_kernels)

    y = run(x)
    exact = specified(x.double(), weight, bias)
    assert_accurate(y, specified(x.float(), weight, bias), exact)
    for count in (1, 5, 8, 9, 16, 17, 40, 64):
        assert_bitwise_equal(run(x[:count]), y[:count], f"first {count} rows")
    for count in (5, 16, 64):
        assert_bitwise_equal(run(x[-count:]), y[-count:], f"last {count} rows")
    elsewhere = F.pad(x, (1, 2), value=torch.nan)[:, 1:-2]
    assert_bitwise_equal(run(elsewhere[:11]), y[:11], "x lies at odd addresses")


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("features", "outputs"),
    [(1536, 20), (2048, 150), (2560, 2), (2560, 80), (3584, 40), (5120, 25), (5120, 56), (8192, 29), (8208, 5)],
)
def test_shares_of_a_weight_of_many_features(features: int, outputs: int, int8: bool, gpu_kernels: str) -> None:
    """One output is more than a fair share, in tiles of unequal height, or there are fewer outputs than blocks.

    Catches: a copy too young, or beyond the end; one place for two tiles' sums; shares that overlap.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, features, generator=g).bfloat16()
    weight = torch.randn(outputs, features, generator=g)
    weight = quantised(weight) if int8 else weight.bfloat16()
    y = skinny_linear(x, weight, out_dtype=torch.float32, backend=gpu_kernels)
    exact = specified(x.double(), weight)
    assert_accurate(y, specified(x.float(), weight), exact)
    for count in (1, 5, 8):
        few = skinny_linear(x[:count], weight, out_dtype=torch.float32, backend=gpu_kernels)
        assert_bitwise_equal(few, y[:count], f"first {count} rows")


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize(("features", "outputs"), [(1536, 70), (2560, 80), (3584, 40), (8192, 29)])
def test_a_card_of_less_memory_gives_the_same_bits(
    features: int, outputs: int, int8: bool, gpu_kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, features, generator=g).bfloat16(), torch.randn(outputs, features, generator=g)
    weight = quantised(weight) if int8 else weight.bfloat16()
    expected = skinny_linear(x, weight, backend=gpu_kernels)
    monkeypatch.setenv("SHIM_MEMORY_OF_BLOCK", str(99 * 1024))
    for count in (3, 9):
        assert_bitwise_equal(skinny_linear(x[:count], weight, backend=gpu_kernels), expected[:count], f"{count} rows")


def test_a_weight_of_one_row_has_no_stride(gpu_kernels: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(12, 64, generator=g).bfloat16(), torch.randn(4, 77, generator=g).bfloat16()
    expected = skinny_linear(x, weights[:1, :64].clone(), backend=gpu_kernels)
    for count in (3, 12):
        actual = skinny_linear(x[:count], weights[:1, :64], backend=gpu_kernels)
        assert_bitwise_equal(actual, expected[:count], f"{count} rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_int8_is_read_exactly_beside_16_bits(dtype: torch.dtype, gpu_kernels: str) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8).view(16, 16)
    weight = Int8Weight(values, torch.ones(16))
    y = skinny_linear(torch.eye(16, dtype=dtype), weight, out_dtype=torch.float32, backend=gpu_kernels)
    assert_bitwise_equal(y.T, values.float(), "weights")


def test_out_dtype_is_that_of_x_or_float32(backend: str) -> None:
    with pytest.raises(ValueError, match=r"out_dtype must be torch.float32 or that of x"):
        skinny_linear(torch.ones(1, 2), torch.ones(3, 2), out_dtype=torch.float64, backend=backend)
