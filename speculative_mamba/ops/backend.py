"""The backends of every op: an ordered table, each with a probe that answers (ok, reason)."""

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from . import installation
from .threads import num_threads

_CUDA_WHEEL = "speculative_mamba_cuda"
_SOURCE = {"cpu": "native", "cuda": "native", "triton": "triton", "reference": "reference"}  # file of each op


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """The compiled CPU kernels, or None, and the reason. Where two versions are on the path, stderr says so, once."""
    warning = installation.ambiguity()
    if warning:
        print(f"speculative_mamba: {warning}", file=sys.stderr)
    try:
        module = installation.load("_C")
    except ImportError as error:
        return None, f"{error}; {installation.cure('_C', 'pip install -e .', 'speculative-mamba')}"
    isa = os.environ.get("SPECULATIVE_MAMBA_ISA")
    if isa:
        try:
            module.select_isa(isa)
        except ValueError as error:
            raise ValueError(f"SPECULATIVE_MAMBA_ISA: {error}") from None
    return module, f"C++ kernels, instruction set {module.isa()}"


def has_tiles() -> bool:
    """Whether the CPU kernels in use multiply bfloat16 by tiles (AMX)."""
    module = extension()[0]
    return module is not None and module.isa().startswith("amx")


@functools.cache
def cuda_extension() -> tuple[ModuleType | None, str]:
    """The compiled CUDA kernels, or None, and the reason."""
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA device"
    try:
        module = _load_cuda()
    except ImportError as error:
        return None, f"{error}; {_cuda_cure()}"
    if module.problem():
        return None, f"the CUDA kernels cannot run: {module.problem()}"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(module.architectures, capability):
            card = f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
            return None, f"the CUDA kernels are built for {module.architectures}, not for {card}; {_cuda_cure()}"
    return module, f"CUDA kernels for {module.architectures}"


def _cuda_cure() -> str:
    return installation.cure("_C_cuda", "SPECULATIVE_MAMBA_CUDA=on pip install -e .", "speculative-mamba-cuda")


def _load_cuda() -> ModuleType:
    """The CUDA kernels of this folder, or those of the wheel speculative-mamba-cuda.

    Raises:
        ImportError: in one line, why neither can be loaded.
    """
    try:
        return installation.load("_C_cuda")
    except ImportError as error:
        if importlib.util.find_spec(_CUDA_WHEEL) is None:
            raise
        if installation.has("_C_cuda"):
            print(f"speculative_mamba: {error}; {_CUDA_WHEEL} is taken instead", file=sys.stderr)
    return installation.load("_C_cuda", _CUDA_WHEEL)


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for architectures such as "80 90 120+PTX" runs on a device.

    Machine code runs on devices of the same major version from its minor version on, PTX on all that are not older.
    """
    for built in architectures.split():
        major, minor = divmod(int(built.removesuffix("+PTX")), 10)
        if major == capability[0] and minor <= capability[1]:
            return True
        if built.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


def _probe_cpu() -> tuple[bool, str]:
    module, reason = extension()
    return module is not None, reason


def _probe_cuda() -> tuple[bool, str]:
    module, reason = cuda_extension()
    return module is not None, reason


def _probe_triton() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return False, f"triton cannot be loaded ({str(error).splitlines()[0]}); install it with: pip install triton"
    return True, f"Triton {version}"


def _probe_reference() -> tuple[bool, str]:
    return True, "PyTorch, the specification of every op"


# name -> (device types it serves, probe), in the order in which "auto" tries them.
BACKENDS: dict[str, tuple[tuple[str, ...], Callable[[], tuple[bool, str]]]] = {
    "cpu": (("cpu",), _probe_cpu),
    "cuda": (("cuda",), _probe_cuda),
    "triton": (("cuda",), _probe_triton),
    "reference": (("cpu", "cuda"), _probe_reference),
}


@functools.cache
def resolve(backend: str, device_type: str) -> str:
    """The backend to use for tensors on a device: the named one, or for "auto" the first that works.

    Falling past a backend that should work prints one line on stderr, once.

    Raises:
        ValueError: the name is unknown, or the named backend does not work here.
    """
    if backend == "auto":
        for name, (devices, probe) in BACKENDS.items():
            if device_type in devices:
                ok, reason = probe()
                if ok:
                    return name
                print(f"speculative_mamba: backend '{name}' is off: {reason}", file=sys.stderr)
        raise ValueError(f"no backend for device '{device_type}'; use --device cpu")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend '{backend}'; choose from: auto, {', '.join(BACKENDS)}")
    devices, probe = BACKENDS[backend]
    if device_type not in devices:
        raise ValueError(f"backend '{backend}' does not run on device '{device_type}'; it runs on {', '.join(devices)}")
    ok, reason = probe()
    if not ok:
        raise ValueError(f"backend '{backend}' is off: {reason}")
    return backend


def compiled(like: torch.Tensor) -> tuple[ModuleType, int]:
    """The compiled kernels for a tensor's device, and where they run: the number of threads, or the stream."""
    if like.is_cuda:
        return cuda_extension()[0], torch.cuda.current_stream(like.device).cuda_stream
    return extension()[0], num_threads()


def current_device(like: torch.Tensor) -> AbstractContextManager:
    """Within it kernels are launched on a tensor's device."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


@functools.cache
def _implementation(op: str, backend: str) -> Callable:
    return getattr(importlib.import_module(f"speculative_mamba.ops.{op}.{_SOURCE[backend]}"), op)


class _Recorder(threading.local):
    """Of each thread: the ``UnfinishedRecording`` that is being made."""

    recording = None


recorder = _Recorder()


def refuse_gradients(op: str, args: Mapping[str, object], prefix: str = "") -> None:
    """Raises:
    ValueError: an argument, or what it holds, requires grad, where gradients are enabled.
    """
    if not torch.is_grad_enabled():
        return
    for name, value in args.items():
        if isinstance(value, torch.Tensor | tuple):
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(part, torch.Tensor) and part.requires_grad for part in parts):
                raise ValueError(
                    f"{prefix}{name} requires grad, which the kernels of {op} cannot give; "
                    'use torch.no_grad() or backend="reference"'
                )
        elif hasattr(value, "__dict__"):
            refuse_gradients(op, vars(value), f"{name}.")


def run(op: str, backend: str, args: tuple) -> object:
    """Calls an op's implementation, which takes the op's argument object, on the device of the first argument.

    Raises:
        ValueError: an argument requires grad, where gradients are enabled and the implementation has none.
    """
    if recorder.recording is not None:
        recorder.recording.use(*args)
    first = args[0]
    name = resolve(backend, first.device.type)
    implementation = _implementation(op, name)
    if name != "reference" and torch.is_grad_enabled():
        refuse_gradients(op, args._asdict())
    if not first.is_cuda:
        return implementation(args)
    with current_device(first):
        return implementation(args)
