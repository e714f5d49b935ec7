"""The backends of every op: an ordered table, each with a probe that answers (ok, reason)."""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # as in csrc/params.h


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """The compiled CPU kernels, or None, and the reason."""
    try:
        module = importlib.import_module("speculative_mamba._C")
    except ImportError as error:
        first_line = str(error).splitlines()[0]
        return None, f"speculative_mamba._C cannot be loaded ({first_line}); rebuild it with: pip install -e ."
    isa = os.environ.get("SPECULATIVE_MAMBA_ISA")
    if isa:
        try:
            module.select_isa(isa)
        except ValueError as error:
            raise ValueError(f"SPECULATIVE_MAMBA_ISA: {error}") from None
    return module, f"C++ kernels, instruction set {module.isa()}"


def _probe_cpu() -> tuple[bool, str]:
    module, reason = extension()
    return module is not None, reason


def _probe_reference() -> tuple[bool, str]:
    return True, "PyTorch, the specification of every op"


# name -> (device types it serves, probe), in the order in which "auto" tries them.
BACKENDS: dict[str, tuple[tuple[str, ...], Callable[[], tuple[bool, str]]]] = {
    "cpu": (("cpu",), _probe_cpu),
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


def address(tensor: torch.Tensor | None) -> int:
    """Where the tensor's data starts, as the compiled kernels take it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def run(implementations: dict[str, Callable], backend: str, tensor: torch.Tensor) -> Callable:
    """The implementation of one op for a tensor's device."""
    return implementations[resolve(backend, tensor.device.type)]
