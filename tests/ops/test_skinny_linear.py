"""A few rows times a weight matrix. What lies around x and the weight is NaN."""

import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR

from speculative_mamba.ops import skinny_linear
from speculative_mamba.ops.block_formats import FORMATS
from speculative_mamba.ops.block_weight import BlockWeight, quantized
from speculative_mamba.ops.skinny_linear import SkinnyLinearArgs, reference
from speculative_mamba.testing.blocks import random_blocks
from speculative_mamba.testing.models import as_dtype
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

BLOCKS = ("q8_0", "q4_0")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *BLOCKS], ids=str)
Weight = torch.Tensor | BlockWeight


def make(change: dict | None = None, seed: int = 0) -> tuple[torch.Tensor, Weight]:
    """x (M, K) and weight (N, K), both inside wider matrices of NaN unless contiguous.

    In blocks K is the next multiple of 32. Rows then differ in size, so that the scale of another row would show.
    """
    c = {"contiguous": False, **LINEAR.base, **(change or {})}
    if c["dtype"] in BLOCKS:
        c["in_features"] += -c["in_features"] % 32
    g = torch.Generator().manual_seed(seed)
    margin = 0 if c["contiguous"] else 3

    def matrix(rows: int, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.full((rows, c["in_features"] + 2 * margin), torch.nan, dtype=dtype)
        inner = wide[:, margin : margin + c["in_features"]]
        inner[:] = torch.randn(rows, c["in_features"], generator=g)
        return inner

    x = matrix(c["rows"], torch.float32)
    if c["dtype"] not in BLOCKS:
        return x, matrix(c["out_features"], c["dtype"])
    sizes = 1 + torch.rand(c["out_features"], 1, generator=g)
    return x, quantized(matrix(c["out_features"], torch.float32) * sizes, c["dtype"])


def specified(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
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
    if isinstance(weight, BlockWeight):
        weight.data.view(torch.float16)[0, 2 * 16 + 7] = torch.nan  # the third block's scale
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


@pytest.mark.parametrize("format", FORMATS)
def test_every_value_in_blocks_is_read_exactly(format: str, processor: str) -> None:
    """A byte of any value in any place, with any scale of its own."""
    weight = BlockWeight.from_gguf(random_blocks(50, 512, format), format, 512)
    y = skinny_linear(torch.eye(512), weight, backend=processor)
    # The minimum of q4_k is subtracted from the finished product.
    assert_bitwise_equal(y.T, weight.dequantized() + 0.0, "weights")


@pytest.mark.parametrize("format", BLOCKS)
def test_extreme_values_in_blocks(format: str, backend: str) -> None:
    """Rows of zeros, of subnormal and of large scales; x from subnormal to large."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 96, generator=g) * torch.tensor([1e-42, 1e-38, 1e-20, 1.0, 1e10, 1e20, 1e30])[:, None]
    weight = torch.randn(37, 96, generator=g) * torch.logspace(-9, 4, 37)[:, None]
    weight[3], weight[36] = 0, 0
    weight = quantized(weight, format)
    y = skinny_linear(x, weight, backend=backend)
    assert (y[:, 3] == 0).all() and (y[:, 36] == 0).all()
    size = x.double().abs() @ weight.dequantized().double().abs().T
    error = (y.double() - specified(x.double(), weight)).abs()
    assert (error <= 1e-6 * size + 1e-43).all()


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_of_blocks_is_within_twice_that_of_pytorch(format: str, cpu: str) -> None:
    """Though x is rounded. Catches: a digit too few, a block of x with the scale of another."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 2560, generator=g)
    weight = BlockWeight.from_gguf(random_blocks(64, 2560, format), format, 2560)
    for large in (1.0, 100.0):  # of a feature of each block, beside which the others lose bits
        x[:, ::32] *= large
        exact = specified(x.double(), weight)
        assert_accurate(skinny_linear(x, weight, backend=cpu), specified(x, weight), exact, what=f"{large} times")


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_give_the_same_bits_on_every_instruction_set(format: str, select_isa: object, fused_isas: list) -> None:
    """Catches: products that saturate, digits that do not fit, sums in another order."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(13, 5120, generator=g)
    # The largest digits, and their neighbours, as alone in their block and among others.
    x[:, 512:2560] = torch.tensor([1.9921874, 1.9921875, -1.9921876, 0.99999994, -1.0, 2.0, 1e-8, 0.0]).repeat(256)
    x[1:, :512:32] *= 2.0 ** torch.arange(-24, -12)[:, None]
    raw = random_blocks(50, 5120, format)
    weight, results = BlockWeight.from_gguf(raw, format, 5120), []
    for isa in fused_isas:
        select_isa(isa)
        results.append(skinny_linear(x, weight, backend="cpu"))
        assert_bitwise_equal(results[-1], results[0], isa)


@dtypes
def test_inputs_are_not_modified(dtype: torch.dtype, backend: str) -> None:
    x, weight = make({"dtype": dtype})
    tensors = [x._base, weight.data if isinstance(weight, BlockWeight) else weight._base]
    before = [t.clone() for t in tensors]
    skinny_linear(x, weight, backend=backend)
    for t, snapshot in zip(tensors, before, strict=True):
        assert_bitwise_equal(t, snapshot)


def test_nothing_times_nothing(backend: str) -> None:
    assert skinny_linear(torch.ones(0, 5), torch.ones(3, 5), backend=backend).shape == (0, 3)
    assert skinny_linear(torch.ones(2, 5), torch.ones(0, 5), backend=backend).shape == (2, 0)
    assert_bitwise_equal(skinny_linear(torch.ones(2, 0), torch.ones(3, 0), backend=backend), torch.zeros(2, 3))
    for rows, outputs in ((0, 3), (2, 0)):
        empty = quantized(torch.ones(outputs, 32), "q4_0")
        assert skinny_linear(torch.ones(rows, 32), empty, backend=backend).shape == (rows, outputs)


@pytest.mark.parametrize("change", [{}, {"rows": 64}, {"out_features": 1}, {"dtype": "q8_0"}], ids=str)
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


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, *BLOCKS], ids=str)
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
    features += -features % 32 if weight_dtype in BLOCKS else 0
    x = torch.randn(rows, features, generator=g).to(dtype)
    weight, bias = torch.randn(outputs, features, generator=g), torch.randn(outputs, generator=g)
    weight = as_dtype(weight, weight_dtype)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("features", "outputs"), [(1, 1), (7, 3), (48, 96), (160, 201), (333, 50), (512, 5), (1104, 7), (1552, 100)]
)
def test_a_row_of_16_bits_is_the_same_among_any_others(
    features: int, outputs: int, dtype: torch.dtype, gpu_kernels: str
) -> None:
    """And wherever it lies; the weight is aligned as a whole model's, whatever its number of features.

    Catches: x of a row that is none.
    """
    g = torch.Generator().manual_seed(0)
    x = aligned(torch.randn(67, features, generator=g).to(dtype), torch.nan)
    weight, bias = torch.randn(outputs, features, generator=g), torch.randn(outputs, generator=g)
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


@pytest.mark.parametrize(
    ("features", "outputs"),
    [(1536, 20), (2048, 150), (2560, 2), (2560, 80), (3584, 40), (5120, 25), (5120, 56), (8192, 29), (8208, 5)],
)
def test_shares_of_a_weight_of_many_features(features: int, outputs: int, gpu_kernels: str) -> None:
    """One output is more than a fair share, in tiles of unequal height, or there are fewer outputs than blocks.

    Catches: a copy too young, or beyond the end; one place for two tiles' sums; shares that overlap.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, features, generator=g).bfloat16()
    weight = torch.randn(outputs, features, generator=g).bfloat16()
    y = skinny_linear(x, weight, out_dtype=torch.float32, backend=gpu_kernels)
    exact = specified(x.double(), weight)
    assert_accurate(y, specified(x.float(), weight), exact)
    for count in (1, 5, 8):
        few = skinny_linear(x[:count], weight, out_dtype=torch.float32, backend=gpu_kernels)
        assert_bitwise_equal(few, y[:count], f"first {count} rows")


@pytest.mark.parametrize(("features", "outputs"), [(1536, 70), (2560, 80), (3584, 40), (8192, 29)])
def test_a_card_of_less_memory_gives_the_same_bits(
    features: int, outputs: int, gpu_kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, features, generator=g).bfloat16(), torch.randn(outputs, features, generator=g).bfloat16()
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


@pytest.mark.parametrize("format", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_value_in_blocks_is_read_exactly_by_gpus(dtype: torch.dtype, format: str, gpu_kernels: str) -> None:
    weight = BlockWeight.from_gguf(random_blocks(20, 96, format), format, 96)
    y = skinny_linear(torch.eye(96, dtype=dtype), weight, out_dtype=torch.float32, backend=gpu_kernels)
    assert_bitwise_equal(y.T, weight.dequantized() + 0.0, "weights")


@pytest.mark.parametrize("format", BLOCKS)
@pytest.mark.parametrize(("features", "outputs"), [(32, 1), (256, 17), (1536, 33), (2592, 16)])
def test_blocks_of_many_features_and_few_rows_on_gpus(
    features: int, outputs: int, format: str, gpu_kernels: str
) -> None:
    """Catches: a share of a warp that is left out, a row of x that is none, a scale of another block."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, features, generator=g).bfloat16()
    weight = quantized(torch.randn(outputs, features, generator=g), format)
    y = skinny_linear(x, weight, out_dtype=torch.float32, backend=gpu_kernels)
    exact = specified(x.double(), weight)
    assert_accurate(y, specified(x.float(), weight), exact)
    for count in (1, 2, 4, 5, 7, 8):
        few = skinny_linear(x[:count], weight, out_dtype=torch.float32, backend=gpu_kernels)
        assert_bitwise_equal(few, y[:count], f"first {count} rows")


def test_out_dtype_is_that_of_x_or_float32(backend: str) -> None:
    with pytest.raises(ValueError, match=r"out_dtype must be torch.float32 or that of x"):
        skinny_linear(torch.ones(1, 2), torch.ones(3, 2), out_dtype=torch.float64, backend=backend)
