"""What holds for every op where Python meets the kernels: names, sizes and constants are kept once, and by default a
call may follow whatever wrote its arguments."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
from cases import CASES, B, N, Random, T, call
from shim import built_shim, synchronize

from speculative_mamba import ops
from speculative_mamba.ops import backend as backends
from speculative_mamba.ops import checks, sampling
from speculative_mamba.ops.commit_tokens import FinishReason, Record
from speculative_mamba.ops.gated_silu import GatedSiluArgs
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
FOR_SAMPLING = ["purpose", "target_probs"]


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
    args, sizes = GatedSiluArgs(x, x), {"activations": x.dtype, "rows": 1, "features": 3}
    with pytest.raises(TypeError, match="nothing fills the field 'y'"):
        kernels.gated_silu(args, 1, **sizes)
    with pytest.raises(TypeError, match="no field takes the keyword 'column'"):
        kernels.gated_silu(args, 1, **sizes, y=x, column=1)
    with pytest.raises(TypeError, match="no field takes the keyword 'up_row_stride'"):
        kernels.gated_silu(args, 1, **sizes, y=x, up_row_stride=1)
    with pytest.raises(TypeError):
        kernels.gated_silu(args, 1, **{**sizes, "rows": 1.5}, y=x)


@pytest.mark.parametrize("op_name", ["attention_verify", "speculative_accept"])
def test_too_little_scratch_memory_is_refused(op_name: str, shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is launched. With the bytes that C++ asks for each call works."""
    asked = []

    def run(missing: int) -> None:
        def scratch(like: torch.Tensor) -> object:
            return lambda size: asked.append(size) or torch.empty(size - missing, dtype=torch.uint8)

        monkeypatch.setattr(import_module(f"speculative_mamba.ops.{op_name}.native"), "scratch", scratch)
        if op_name == "attention_verify":
            call(op_name, *CASES[op_name](Random(torch.float32)), "cuda")
            return
        keys, positions, logits = torch.zeros(2, 2).long(), torch.zeros(2).long(), torch.randn(2, 3, 5000)
        sampling = tensors(SamplingParams(temperature=1.0, logit_bias={4: 1.0}), 2, 5000)
        ops.speculative_accept(logits, torch.zeros(2, 2).long(), None, sampling, keys, positions, backend="cuda")

    run(0)
    assert asked[0] > 0
    with pytest.raises(ValueError, match=rf"^scratch_bytes is {asked[0] - 1}, but the kernel needs {asked[0]}$"):
        run(1)


def ssd_of_large_heads(r: Random) -> tuple[dict, dict, dict]:
    """As the kernel that reads ahead takes them."""
    window = {name: r.activations(B, T, 2, N) for name in ("B", "C")}
    window |= {"x": r.activations(B, T, 2, 32), "dt": r.activations(B, T, 2)}
    return window, {"states": r.slots(2, 32, N)}, {"A": -r(2).exp(), "D": r(2), "dt_bias": r(2)}


@pytest.mark.parametrize(
    ("op_name", "weight", "rows"),
    [
        ("causal_conv1d_verify", "weight", B), ("causal_conv1d_verify", "bias", B), ("rms_norm", "weight", B),
        ("selective_scan_verify", "A", B), ("selective_scan_verify", "D", B), ("selective_scan_verify", "dt_bias", B),
        ("skinny_linear", "weight", 8), ("skinny_linear", "weight", 10), ("ssd_verify", "A", B),
        ("ssd_verify", "D", B), ("ssd_verify", "dt_bias", B),
    ],
)  # fmt: skip
def test_weights_that_the_kernel_before_has_written(op_name: str, weight: str, rows: int, shim: ModuleType) -> None:
    """Are waited for, unless the caller says that they are constant: then the shim finds that they are not."""
    case = ssd_of_large_heads if op_name == "ssd_verify" else CASES[op_name]
    window, cache, rest = case(Random(torch.bfloat16 if op_name == "skinny_linear" else torch.float32))
    window = {name: tensor[:rows] for name, tensor in window.items()}

    def run(weights: torch.Tensor, **options: object) -> torch.Tensor:
        fresh = {name: tensor.clone() for name, tensor in cache.items()}
        return call(op_name, window, fresh, {**rest, weight: weights, **options}, "cuda")

    def written() -> torch.Tensor:
        old = rest[weight].reshape(1, -1)
        return ops.gated_silu(torch.full_like(old, 2.0), old, backend="cuda").view_as(rest[weight])

    expected = run(written().clone())
    assert_bitwise_equal(run(written()), expected)
    with pytest.raises(RuntimeError, match="a constant that a kernel before has written"):
        run(written(), constant_weights=True)
    constant = written()
    synchronize()
    assert_bitwise_equal(run(constant, constant_weights=True), expected)
