"""Kernel calls recorded once and run again without Python between them."""

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _pop_torch_dispatch_stack,
    _push_on_torch_dispatch_stack,
)

from .backend import compiled, current_device, recorder
from .threads import num_threads

_Result = TypeVar("_Result")
_SHARED_FROM = 32768  # elements from which PyTorch shares a copy among threads


class StaleRecordingError(ValueError):
    """A tensor that was passed to an op lies elsewhere, or has another size, than when the op was recorded."""


class Recording:
    """Calls of ops that ``record`` noted, all of them.

    ``run()`` makes them again on the same memory: what lies in the tensors may have changed, where they lie and how
    they are laid out may not. All of that memory lives as long as the recording; results of ops are shared as
    ``next_stage`` says.
    """

    def __init__(
        self,
        like: torch.Tensor,
        calls: list[Callable[[int], None]],
        passed: list[torch.Tensor],
        memory: list[torch.UntypedStorage],
    ) -> None:
        """calls: runs of programs, and between them PyTorch's operations. passed: to ops, by the caller. memory: all
        that the calls use."""
        self._like, self._calls, self._passed, self._memory = like, calls, passed, memory
        self._places = _places(passed)

    def run(self, *, unchanged: bool = False) -> None:
        """Makes the calls again.

        unchanged: the caller knows that no tensor was given other memory. Looking costs 0.2 µs a tensor.

        Raises:
            StaleRecordingError: a tensor lies elsewhere or has another size; nothing was run.
        """
        if not unchanged and self._places != _places(self._passed):
            raise StaleRecordingError("a recorded op's tensor has other memory or size by now; record again")
        if self._like.is_cuda:
            with current_device(self._like):
                self._run(compiled(self._like)[1])
        else:
            self._run(num_threads())

    def _run(self, where: int) -> None:
        for call in self._calls:
            call(where)


def record(
    like: torch.Tensor,
    function: Callable[..., _Result],
    *arguments: object,
    relied_on: Iterable = (),
    known: bool = False,
) -> tuple[_Result, Recording]:
    """Calls a function; its result, and a recording of the ops on backends ``cpu`` and ``cuda``, on the device of
    ``like``, that it called.

    relied_on: tensors of which the calls use parts. known: these calls were recorded before and held none of PyTorch's
    operations, so these need not be looked at, which costs some 10 µs each.

    PyTorch's own operations are run again where ``torch_op`` calls them. Others but for views and uninitialised memory
    raise a ValueError that names them. After an error or an interrupt there is no recording.
    """
    unfinished, programs = UnfinishedRecording(like), compiled(like)[0].Program
    unfinished.use(*relied_on)
    # Python runs the handlers of signals, and raises what they raise, behind calls, in loops and at the beginning of a
    # function. So none can come between a ``try`` and its first call, nor before the first statement of a ``finally``.
    try:
        recorder.recording = unfinished
        try:
            unfinished.begin_program()
            result = function(*arguments) if known else _kernels_only(unfinished, function, arguments)
        finally:
            programs.record(None)
    finally:
        recorder.recording = None
    return result, unfinished.finished()


def _kernels_only(unfinished: "UnfinishedRecording", function: Callable[..., _Result], arguments: tuple) -> _Result:
    mode = _KernelsOnly(unfinished)
    try:
        _push_on_torch_dispatch_stack(mode)  # what ``with mode`` does is Python
        result = function(*arguments)
    finally:
        _pop_torch_dispatch_stack(None)
    return result


class UnfinishedRecording:
    """What ``record`` has noted so far. refuses: PyTorch's operations; not while ``torch_op`` calls one.

    used: tensors that were passed to ops or of which views were taken. made: views and uninitialised memory. By
    identity.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like.new_empty(0)
        self._program = None  # the one to which ops are added
        self._calls: list[Callable[[int], None]] = []
        self._stages: tuple[list[torch.Tensor], ...] = ([], [])
        self._results_of_stage = 0  # so far
        self._used: dict[int, torch.Tensor] = {}
        self._made: dict[int, torch.Tensor] = {}
        self.refuses = True

    def begin_program(self) -> None:
        program = compiled(self._like)[0].Program()
        program.record(program)
        self._program = program
        self._calls.append(lambda where: program.run(where))

    def finished(self) -> Recording:
        own = {result.data_ptr() for results in self._stages for result in results}
        passed, memory = [], [result.untyped_storage() for results in self._stages for result in results]
        for key, tensor in (self._used | self._made).items():
            storage = tensor.untyped_storage()
            memory.append(storage)
            if key not in self._made and storage.data_ptr() not in own:
                passed.append(tensor)
        return Recording(self._like, self._calls, passed, memory)

    def use(self, *values: object) -> None:
        """Notes the tensors among arguments of an op, also those that an argument holds."""
        for value in values:
            if isinstance(value, torch.Tensor):
                self._used[id(value)] = value
            elif isinstance(value, tuple):
                self.use(*value)
            elif hasattr(value, "__dict__"):
                self.use(*vars(value).values())

    def make(self, result: torch.Tensor) -> None:
        """Notes a view or uninitialised memory."""
        self._made[id(result)] = result

    def torch_op(self, function: Callable, arguments: tuple, options: dict[str, object]) -> None:
        self.use(*arguments, *options.values())
        self._program.record(None)
        self.refuses = False
        try:
            function(*arguments, **options)
        finally:
            self.refuses = True
        call = _bound(function, arguments, options) if self._like.is_cuda else _on_host(function, arguments, options)
        if not len(self._program):
            self._calls.pop()
        self._calls.append(lambda where: call())
        self.begin_program()

    def next_stage(self) -> None:
        self._stages, self._results_of_stage = self._stages[::-1], 0

    def new_result(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        results, at = self._stages[0], self._results_of_stage
        self._results_of_stage += 1
        if at == len(results) or results[at].shape != shape or results[at].dtype != dtype:
            results.insert(at, like.new_empty(shape, dtype=dtype))
        return results[at]


def _bound(function: Callable, arguments: tuple, options: dict[str, object]) -> Callable[[], object]:
    return functools.partial(function, *arguments, **options)


# What gives the same for whole numbers, as ``_is_same_in_numpy`` has it, in a tenth of the time.
_NUMPY = {
    torch.add: np.add,
    torch.cat: np.concatenate,
    torch.lt: np.less,
    torch.minimum: np.minimum,
    torch.sub: np.subtract,
    torch.Tensor.copy_: np.copyto,
}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _on_host(function: Callable, arguments: tuple, options: dict[str, object]) -> Callable[[], object]:
    """A call of one of PyTorch's operations on the same memory of the CPU, by numpy where that does the same."""
    if not (function in _NUMPY and _is_same_in_numpy(function, arguments, options)):
        return _bound(function, arguments, options)
    return _bound(_NUMPY[function], _arrays(arguments), dict(zip(options, _arrays(options.values()), strict=True)))


def _is_same_in_numpy(function: Callable, arguments: tuple, options: dict[str, object]) -> bool:
    """Whether a call of ``_NUMPY``, which PyTorch has made already, has bit for bit that result by numpy: of tensors of
    one integer dtype and numbers that it holds. Both wrap where a result does not fit; of other dtypes and numbers each
    makes its own common dtype."""
    if len(arguments) != 2 or list(options) != ([] if function is torch.Tensor.copy_ else ["out"]):
        return False
    out = options.get("out", arguments[0])
    operands = [*arguments]
    if function is torch.cat:
        tensors, dim = arguments
        if not isinstance(tensors, tuple) or type(dim) is not int or len({tensor.ndim for tensor in tensors}) != 1:
            return False  # PyTorch leaves out an empty tensor of one dimension
        operands = [*tensors]
    dtype = operands[0].dtype
    if dtype not in _INTEGERS or not (out.dtype == dtype or (function is torch.lt and out.dtype in _INTEGERS)):
        return False
    limits = torch.iinfo(dtype)
    return all(
        value.dtype == dtype
        if isinstance(value, torch.Tensor)
        else type(value) is int and limits.min <= value <= limits.max
        for value in operands
    )


def _arrays(values: Iterable[object]) -> tuple:
    """Tensors as arrays, also those in a tuple."""
    return tuple(
        value.numpy() if isinstance(value, torch.Tensor) else _arrays(value) if isinstance(value, tuple) else value
        for value in values
    )


def _places(tensors: list[torch.Tensor]) -> list[list[int]]:
    return [list(map(torch.Tensor.data_ptr, tensors)), list(map(torch.Tensor.numel, tensors))]


class _KernelsOnly(TorchDispatchMode):
    """Refuses PyTorch's operations, but for views and uninitialised memory, which are noted.

    Raises:
        ValueError: another operation is used.
    """

    def __init__(self, unfinished: UnfinishedRecording) -> None:
        super().__init__()
        self._unfinished = unfinished

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nobody compiles this; to skip it PyTorch would import its compiler, for 3 s and 150 MB

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (), options: dict | None = None):
        if not self._unfinished.refuses:
            return function(*arguments, **(options or {}))
        if not _computes_nothing(function):
            raise ValueError(f"{function} is PyTorch's and would not be run again, so it cannot be in a recorded step")
        self._unfinished.use(*arguments)
        results = function(*arguments, **(options or {}))
        for result in results if isinstance(results, list | tuple) else [results]:
            self._unfinished.make(result)
        return results


@functools.cache
def _computes_nothing(function: torch._ops.OpOverload) -> bool:
    """Whether it gives a view, or memory as it is."""
    aliases = [returned.alias_info for returned in function._schema.returns]
    is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return is_view or function.overloadpacket in _ALLOCATIONS


_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided}


class ResultPool:
    """Copies of one tensor in memory that is used again once nothing refers to an earlier copy.

    Fresh memory costs a page fault for every 4 KiB, and PyTorch's own copy would share the work with threads that
    then spin for a while on the cores that the next kernel needs.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """tensor: contiguous float32, of the same shape at every call."""
        if tensor.is_cuda or tensor.numel() < _SHARED_FROM:
            return tensor.clone()
        memory = self._free.pop() if self._free else np.empty(tensor.shape, np.float32)
        lent = memory.view()  # lives as long as the tensor's storage, whatever views of it there are
        weakref.finalize(lent, self._free.append, memory).atexit = False
        np.copyto(lent, tensor.numpy())
        return torch.from_numpy(lent)


def next_stage() -> None:
    """Inside ``record``: results from before the last stage are no longer needed, and their memory is used again.

    Keeps the memory of a deep model's activations small enough for the caches.
    """
    if recording := recorder.recording:
        recording.next_stage()


def is_recording() -> bool:
    """Whether this thread is inside ``record``."""
    return recorder.recording is not None


def torch_op(function: Callable, *arguments: object, **options: object) -> None:
    """Calls an operation of PyTorch, or what is made of some, that writes into memory which is given to it.

    Inside ``record`` it becomes part of the recording: it is called again on the same arguments.
    """
    if recording := recorder.recording:
        recording.torch_op(function, arguments, options)
    else:
        function(*arguments, **options)


def new_result(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor for an op's result, of the device and, unless told otherwise, the dtype of ``like``."""
    recording = recorder.recording
    dtype = dtype or like.dtype
    return like.new_empty(shape, dtype=dtype) if recording is None else recording.new_result(like, shape, dtype)


def scratch(like: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """What makes the scratch memory that a kernel asks for, of so many bytes."""
    return lambda size: new_result(like, size, dtype=torch.uint8)
