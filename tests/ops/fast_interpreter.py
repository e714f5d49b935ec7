"""Triton's interpreter without what it finds out anew for every operation: types, shapes and constants.

The operations themselves are Triton's; ``test_interpreter.py`` compares results with and without.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends."""
    for owner, name, value in _replacements():
        monkeypatch.setattr(owner, name, value)


def _by_name(function: Callable) -> Callable:
    """Of one dtype, computed once: two of one name are equal."""
    results: dict[str, Any] = {}

    def call(dtype: Any) -> Any:
        found = results.get(dtype.name)
        if found is None:
            found = results[dtype.name] = function(dtype)
        return found

    return call


@functools.cache
def _replacements() -> list[tuple[object, str, Any]]:
    import triton.language as tl
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    of_block, unwrap = core.block_type.__init__, core._unwrap_if_constexpr
    constant, check = TritonSemantic.scalar_constant, TritonSemantic.binary_op_type_checking_impl
    convert, common, whole = TritonSemantic.cast, functools.cache(np.broadcast_shapes), (tl.int32, tl.int64)
    convert_bits, of_two = interpreter._convert_float, interpreter.InterpreterBuilder.binary_op
    Handle = interpreter.TensorHandle
    blocks: dict[tuple, dict] = {}
    interned: dict[tuple, core.block_type] = {}
    constants: dict[tuple, core.tensor] = {}
    scalar_shape, scalar_numel = core.tuple([]), core.constexpr(1)

    def init_block(self: core.block_type, element: core.dtype, shape: Any) -> None:
        dims = tuple([size.__index__() for size in shape])
        key = element.name, dims
        if key not in blocks:
            of_block(self, element, list(dims))
            self.dims, self.sizes = dims, core.tuple([core.constexpr(size) for size in dims])
            self.count = core.constexpr(self.numel)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def block(element: core.dtype, dims: tuple[int, ...]) -> core.block_type:
        key = element.name, dims
        return interned[key] if key in interned else interned.setdefault(key, core.block_type(element, dims))

    def with_element_ty(self: core.block_type, element: core.dtype) -> core.block_type:
        return block(element, self.dims)

    def init_handle(self: Handle, data: np.ndarray, dtype: core.dtype, attr: dict | None = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if dtype.__class__ is not core.dtype or 8 * data.itemsize > dtype.primitive_bitwidth:
            self.__post_init__()  # whether it fits

    def init_tensor(self: core.tensor, handle: object, type: core.dtype) -> None:
        self.handle, self.type = handle, type
        if type.__class__ is core.block_type:
            self.dtype, self.shape, self.numel = type.element_ty, type.sizes, type.count
        else:
            self.dtype, self.shape, self.numel = type, scalar_shape, scalar_numel

    def unwrap_if_constexpr(value: Any) -> Any:
        kind = value.__class__
        if kind is core.tensor or kind is int or kind is float or kind is core.dtype:
            return value
        return value.value if kind is core.constexpr else unwrap(value)

    def scalar_constant(self: TritonSemantic, value: complex, dtype: core.dtype) -> core.tensor:
        if dtype.is_int_unsigned():
            return constant(self, value, dtype)  # whose data a shift would make signed
        key = value, dtype.name
        found = constants.get(key)
        if found is None:
            found = constants[key] = constant(self, value, dtype)
        return found

    def dims_of(tensor: core.tensor) -> tuple[int, ...]:
        return tensor.type.dims if tensor.type.__class__ is core.block_type else ()

    def widened(tensor: core.tensor, dims: tuple[int, ...]) -> core.tensor:
        handle = tensor.handle
        data = np.empty(dims, handle.data.dtype)
        data[...] = handle.data
        return core.tensor(Handle(data, handle.dtype.scalar), block(tensor.dtype, dims))

    def named_wide(tensor: core.tensor, dims: tuple[int, ...]) -> core.tensor:
        """For an operation of NumPy on two operands, which broadcasts them itself."""
        return core.tensor(tensor.handle, block(tensor.dtype, dims))

    def broadcast(
        self: TritonSemantic, lhs: core.tensor, rhs: core.tensor, widen: Callable = widened
    ) -> tuple[core.tensor, core.tensor]:
        left, right = dims_of(lhs), dims_of(rhs)
        if left == right:
            return lhs, rhs
        dims = common(left, right)
        return lhs if left == dims else widen(lhs, dims), rhs if right == dims else widen(rhs, dims)

    def number(value: Any, dtype: core.dtype) -> bool:
        """Whether the value takes the dtype of a tensor beside it, as it is."""
        if value.__class__ is int:
            return dtype is tl.float32 or (dtype in whole and -(2**31) <= value < 2**31)
        return value.__class__ is float and dtype is tl.float32

    def checked(
        self: TritonSemantic, lhs: Any, rhs: Any, lhs_ptr: bool = False, rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> tuple:  # fmt: skip
        if arithmetic_check and lhs.__class__ is core.tensor:
            dtype = lhs.dtype
            if rhs.__class__ is core.tensor:
                if dtype.__class__ is core.pointer_type:
                    if lhs_ptr and rhs.dtype in whole:
                        return broadcast(self, lhs, rhs, named_wide)
                elif dtype is rhs.dtype and not div_or_mod:
                    return broadcast(self, lhs, rhs, named_wide)
            elif number(rhs, dtype):
                return broadcast(self, lhs, scalar_constant(self, rhs, dtype), named_wide)
        elif arithmetic_check and rhs.__class__ is core.tensor and number(lhs, rhs.dtype):
            return broadcast(self, scalar_constant(self, lhs, rhs.dtype), rhs, named_wide)
        return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic_check, div_or_mod)

    def cast(self: TritonSemantic, tensor: core.tensor, dtype: core.dtype, rounding: str | None = None) -> core.tensor:
        return tensor if tensor.dtype is dtype else convert(self, tensor, dtype, rounding)

    def convert_float(data: np.ndarray, source: core.dtype, target: core.dtype, rounding: object) -> np.ndarray:
        if source.name == "bf16" and target.name == "fp32" and not ((data & 0x7FFF) - 1 < 0x7F).any():  # subnormal
            return data.astype(np.uint32) << 16
        return convert_bits(data, source, target, rounding)

    def binary_op(self: interpreter.InterpreterBuilder, lhs: Handle, rhs: Handle, op: Callable) -> Handle:
        data = lhs.data
        output = op(data, rhs.data)
        return Handle(output, lhs.dtype.scalar) if output.dtype is data.dtype else of_two(self, lhs, rhs, op)

    def arithmetic(name: str, operation: np.ufunc) -> tuple[object, str, Callable]:
        """Of two numbers of one dtype."""
        member = getattr(TritonSemantic, name)

        def call(self: TritonSemantic, lhs: Any, rhs: Any, sanitize_overflow: bool) -> core.tensor:
            if lhs.__class__ is core.tensor and rhs.__class__ is core.tensor:
                dtype = lhs.dtype
                if dtype is rhs.dtype and (dtype is tl.float32 or dtype in whole):
                    left, right = dims_of(lhs), dims_of(rhs)
                    dims = left if left == right else common(left, right)
                    kind = lhs.type if dims == left else block(dtype, dims)
                    return core.tensor(Handle(operation(lhs.handle.data, rhs.handle.data), dtype), kind)
            return member(self, lhs, rhs, sanitize_overflow)

        return TritonSemantic, name, call

    def interpreted(member: Callable) -> Callable:
        function = getattr(member, "__wrapped__", member)  # without the check that it is in a kernel

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **options)

        return call

    @functools.cache
    def builtins_of(package: object) -> list[tuple[str, Callable]]:
        return [(name, interpreted(member)) for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch_builtin(package: object, builder: object, scope: object) -> None:
        for name, call in builtins_of(package):
            scope.set_attr(package, name, call)

    def equal(self: core.dtype, other: Any) -> bool:
        other = unwrap_if_constexpr(other)
        return self is other or (isinstance(other, core.dtype) and self.name == other.name)

    return [
        (interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype)),
        (core.block_type, "__init__", init_block),
        (core.block_type, "with_element_ty", with_element_ty),
        (Handle, "__init__", init_handle),
        (core.tensor, "__init__", init_tensor),
        (core, "_unwrap_if_constexpr", unwrap_if_constexpr),
        (core.dtype, "__eq__", equal),
        (core.dtype, "__hash__", lambda self: hash(self.name)),
        (TritonSemantic, "scalar_constant", scalar_constant),
        (TritonSemantic, "broadcast_impl_value", broadcast),
        (TritonSemantic, "binary_op_type_checking_impl", checked),
        (TritonSemantic, "cast", cast),
        (interpreter, "_convert_float", convert_float),
        (interpreter.InterpreterBuilder, "binary_op", binary_op),
        *map(arithmetic, ("add", "sub", "mul"), (np.add, np.subtract, np.multiply)),
        (interpreter, "_patch_builtin", patch_builtin),
    ]
