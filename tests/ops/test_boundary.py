"""What holds for every op where Python meets the kernels: names, sizes and constants are kept once, and by default a
call may follow whatever wrote its arguments."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import ATTENTION, CONVOLUTION, LINEAR, NORM, OPS, SELECTIVE_SCAN, SSD
from description import Op
from shim import CUDA, built_shim, synchronize

from speculative_mamba import ops
from speculative_mamba.ops import backend as backends
from speculative_mamba.ops import checks, sampling
from speculative_mamba.ops.commit_tokens import FinishReason, Record
from speculative_mamba.ops.mlp_activation import MlpActivationArgs
from speculative_mamba.ops.noise import Purpose
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.testing.sampling import tensors
from speculative_mamba.testing.tolerance import assert_bitwise_equal


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The CUDA kernels on the CPU, as backend ``cuda``."""
    monkeypatch.setitem(backends.BACKENDS, "cuda", (("cpu",), lambda: (True, "for a test")))
    monkeypatch.setattr(backends, "extension", lambda: (built_shim(), "CUDA kernels on the CPU"))
    backends.resolve.cache_clear()
    synchronize()
    yield built_shim()
    backends.resolve.cache_clear()


# sample_tokens is speculative_accept without a drafted token, of which each has arguments of its own.
WITH_KERNELS = [name for name in ops.__all__ if name != "sample_tokens"]
FOR_SAMPLING = ["purpose", "target_probs", "row_status"]
UNDESCRIBED = {
    "sample_tokens",
    "speculative_accept",
    "commit_tokens",
    "embed_tokens",
}  # of which cases.py has no description


@pytest.mark.parametrize("op_name", WITH_KERNELS)
def test_backends_take_the_arguments_of_the_public_function(op_name: str) -> None:
    """In its order; but for the backend, and for what the public function fills itself."""
    parameters = inspect.signature(getattr(ops, op_name)).parameters.values()
    public = [p.name for p in parameters if p.name != "backend" and (p.name != "row_status" or p.default is p.empty)]
    public += FOR_SAMPLING if op_name == "speculative_accept" else []
    for source in ("reference", "native"):
        function = getattr(import_module(f"speculative_mamba.ops.{op_name}.{source}"), op_name)
        [args] = inspect.signature(function).parameters.values()
        assert list(args.annotation._fields) == public, source


@pytest.mark.parametrize("backend_name", backends.BACKENDS)
def test_every_op_has_a_twin_on_every_backend(backend_name: str) -> None:
    """Catches: an op that was added, or renamed, on some backends only; one that no test asks for."""
    if backend_name == "triton":
        pytest.importorskip("triton")
    for name in WITH_KERNELS:
        assert callable(backends._implementation(name, backend_name)), name
        for folder, suffix in (("cpu", "cpp"), ("cuda", "cu")):
            sources = {path.stem for path in (CUDA.parent / folder).glob(f"*.{suffix}")}
            assert name in sources, f"{name} in csrc/{folder}"
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert tests >= set(ops.__all__) and {op.name for op in OPS} | UNDESCRIBED == set(ops.__all__)


def test_modules_have_all_ops() -> None:
    assert backends.extension()[0].ops == built_shim().ops == WITH_KERNELS


@pytest.mark.parametrize("module", [backends.extension()[0], None], ids=["cpu", "shim"])
def test_constants_are_those_of_the_specification(module: ModuleType | None) -> None:
    module = module or built_shim()
    assert module.MAX_CONV_WIDTH == checks.MAX_CONV_WIDTH
    assert module.RECORD_COLUMNS == Record.TOKENS == max(Record)
    assert max(FinishReason) == module.FINISH_REASONS
    assert module.ROUNDING == sampling.ROUNDING
    assert max(sampling.RowStatus) == module.ROW_STATUSES
    assert tuple(Purpose) == module.PURPOSES


def test_a_struct_is_filled_whole_and_by_known_names() -> None:
    kernels, x = backends.extension()[0], torch.ones(1, 3)
    args, sizes = MlpActivationArgs(x, x, 0), {"activations": x.dtype, "rows": 1, "features": 3}
    with pytest.raises(TypeError, match="nothing fills the field 'y'"):
        kernels.mlp_activation(args, 1, **sizes)
    with pytest.raises(TypeError, match="no field takes the keyword 'column'"):
        kernels.mlp_activation(args, 1, **sizes, y=x, column=1)
    with pytest.raises(TypeError, match="no field takes the keyword 'up_row_stride'"):
        kernels.mlp_activation(args, 1, **sizes, y=x, up_row_stride=1)
    with pytest.raises(TypeError):
        kernels.mlp_activation(args, 1, **{**sizes, "rows": 1.5}, y=x)


@pytest.mark.parametrize("op_name", ["attention_verify", "speculative_accept"])
def test_too_little_scratch_memory_is_refused(op_name: str, shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is launched. With the bytes that C++ asks for each call works."""
    asked = []

    def run(missing: int) -> None:
        def scratch(like: torch.Tensor) -> object:
            return lambda size: asked.append(size) or torch.empty(size - missing, dtype=torch.uint8)

        monkeypatch.setattr(import_module(f"speculative_mamba.ops.{op_name}.native"), "scratch", scratch)
        if op_name == "attention_verify":
            ATTENTION.run(ATTENTION.make(), "cuda")
            return
        keys, positions, logits = torch.zeros(2, 2).long(), torch.zeros(2).long(), torch.randn(2, 3, 5000)
        sampling = tensors(SamplingParams(temperature=1.0, logit_bias={4: 1.0}), 2, 5000)
        ops.speculative_accept(logits, torch.zeros(2, 2).long(), None, sampling, keys, positions, backend="cuda")

    run(0)
    assert asked[0] > 0
    with pytest.raises(ValueError, match=rf"^scratch_bytes is {asked[0] - 1}, but the kernel needs {asked[0]}$"):
        run(1)


# as the kernel that reads ahead takes them
LARGE_HEADS = {"heads": 2, "x_heads": 2, "head_size": 32, "c_groups": 2, "state_size": 16, "contiguous": True}
ROWS_OF_16_BITS = {"activations": torch.bfloat16, "dtype": torch.bfloat16, "in_features": 200, "out_features": 33}


@pytest.mark.parametrize(
    ("op", "change", "names"),
    [
        (CONVOLUTION, {}, ("weight", "bias")), (NORM, {"features": 40}, ("weight",)),
        (SELECTIVE_SCAN, {}, ("A", "D", "dt_bias")),
        (SSD, LARGE_HEADS, ("A", "D", "dt_bias")), (LINEAR, {**ROWS_OF_16_BITS, "rows": 8}, ("weight",)),
        (LINEAR, {**ROWS_OF_16_BITS, "rows": 10, "contiguous": True}, ("weight",)),
    ],
    ids=str,
)  # fmt: skip
def test_weights_that_the_kernel_before_has_written(op: Op, change: dict, names: tuple, shim: ModuleType) -> None:
    """Are waited for, unless the caller says that they are constant: then the shim finds that they are not."""
    arguments = op.make({"contiguous": True} | change)
    for weight in names:

        def run(weights: torch.Tensor, name: str = weight, **options: object) -> torch.Tensor:
            return op.run(op.copy(arguments) | {name: weights}, "cuda", **options)

        def written(name: str = weight) -> torch.Tensor:
            old = arguments[name].reshape(1, -1)
            return ops.mlp_activation(torch.full_like(old, 2.0), old, backend="cuda").view_as(arguments[name])

        expected = run(written().clone())
        assert_bitwise_equal(run(written()), expected)
        with pytest.raises(RuntimeError, match="a constant that a kernel before has written"):
            run(written(), constant_weights=True)
        constant = written()
        synchronize()
        assert_bitwise_equal(run(constant, constant_weights=True), expected)
