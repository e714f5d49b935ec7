"""Triton's interpreter as the tests run it computes what it computes by itself."""

import importlib.util
import itertools
import math

import numpy as np
import pytest
from fast_interpreter import speed_up

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint32", "int8", "int1")
SHAPES = ((), (4,), (2, 4), (2, 1), (1,))
NUMBERS = (0, 1, -3, 2**31, 2**40, 0.0, -0.0, 1.5, math.nan, 1e-45, 1e300, True)
BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor_", "shl", "ashr", "lshr", "less_than",
    "less_equal", "greater_than", "equal", "not_equal", "minimum", "maximum", "fdiv",
)  # fmt: skip
REST = {"add": (False,), "sub": (False,), "mul": (False,), "fdiv": (True,)}


def tensor(dtype: str, shape: tuple[int, ...], seed: int) -> object:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    pointer = dtype.startswith("*")
    element = tl.pointer_type(tl.float32) if pointer else getattr(tl, dtype)
    data = np.random.default_rng(seed).integers(1, 200, shape or (1,)) - (0 if pointer else 100)
    if element.is_floating() and not pointer and dtype != "bfloat16":
        data = data / 8
    data = (data.astype(np.int64) if dtype == "bfloat16" else data).astype(_get_np_dtype(element))
    return tl.tensor(TensorHandle(data, element), tl.block_type(element, list(shape)) if shape else element)


def outcome(name: str, *operands: object) -> tuple:
    """Of an operation on tensors, which are given as (dtype, shape), and numbers: type and bits, or the error."""
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_builder

    semantic = tl.semantic.TritonSemantic(interpreter_builder)
    made = [tensor(*operand, seed) if isinstance(operand, tuple) else operand for seed, operand in enumerate(operands)]
    rest = (tl.PropagateNan.ALL,) if name in ("minimum", "maximum") else REST.get(name, ())
    if name == "cast":
        made[1] = getattr(tl, made[1])
    if name == "where":
        made[0] = semantic.to_tensor(made[0])
    try:
        result = getattr(semantic, name)(*made, *rest)
    except Exception as error:
        return type(error).__name__, str(error)
    shape, data = tuple(size.value for size in result.shape), result.handle.data
    assert data.shape == (shape or (1,)) and result.numel.value == data.size
    return str(result.type), str(result.dtype), str(result.handle.dtype), shape, data.dtype, data.tobytes()


WIDE = [(dtype, (2, 4)) for dtype in DTYPES]
FEW = [("float32", (2, 4)), ("int32", ()), ("int64", (4,)), 7, -0.0]
product = itertools.product
POINTERS = list(product(["*float32"], SHAPES))
CASES = {
    **{name: [(name, *pair) for pair in product(product(DTYPES, SHAPES[:3]), [*WIDE, *NUMBERS])] for name in BINARY},
    "a number first": list(product(BINARY, NUMBERS, product(("float32", "int32", "uint32", "int1"), SHAPES[:2]))),
    "shapes": list(product(("add", "less_than"), product(["float32"], SHAPES), product(["float32"], SHAPES))),
    "pointers": list(product(("add", "sub", "equal", "mul"), POINTERS, [*WIDE, POINTERS[0], 3])),
    "a pointer behind": list(product(("add", "sub"), [*WIDE, 3, 1.5], POINTERS)),
    "where": list(product(["where"], (("int1", ()), ("int1", (2, 1)), True), FEW, FEW)),
    "cast": list(product(["cast"], product(DTYPES, SHAPES), DTYPES)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_it_is_faster_and_not_different(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, as much is computed once.

    Catches: a number beside a tensor that keeps its own dtype or takes one that cannot hold it; shapes of one operand.
    """
    expected = [outcome(*case) for case in CASES[name]]
    speed_up(monkeypatch)
    for case, wanted in zip(CASES[name] * 2, expected * 2, strict=True):
        assert outcome(*case) == wanted, case
