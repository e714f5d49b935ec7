"""Triton's interpreter, as far as it does not compute what a GPU does, or does it slowly."""

import dataclasses

import numpy as np
import pytest
from fast_interpreter import speed_up


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends."""
    from triton.runtime import interpreter

    speed_up(monkeypatch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    _patch_once(interpreter, monkeypatch)
    builder = interpreter.interpreter_builder  # which checks every sum of integers, in 64 bits
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def _dot(self: object, a: object, b: object, d: object, *precision: object) -> object:
    """Sums in an order that depends on their length only. NumPy leaves it to BLAS, which also looks at the row, and
    takes bfloat16 for integers.
    """
    from triton.runtime.interpreter import TensorHandle

    products = _widened(a)[..., :, None, :] * np.swapaxes(_widened(b), -1, -2)[..., None, :, :]
    return TensorHandle(products.sum(-1) + d.data, d.dtype.scalar)


def _widened(operand: object) -> np.ndarray:
    if operand.dtype.scalar.name == "bf16":
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data.astype(np.float32)


def _patch_once(interpreter: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch, and every call of a device function, makes the language's functions interpreted ones; once per test
    will do."""
    patch, patched = interpreter._patch_lang, set()

    class UntilTheTestEnds(interpreter._LangPatchScope):
        def set_attr(self, owner: object, name: str, value: object) -> None:
            monkeypatch.setattr(owner, name, value, raising=False)

    def patch_lang(fn: object) -> object:
        standard = fn.__module__.startswith("triton.")  # which calls those of another module
        if standard not in patched:
            patched.add(standard)
            patch(fn)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_LangPatchScope", UntilTheTestEnds)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
