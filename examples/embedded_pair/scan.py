"""Autograd functions around ``scan.cpp``: RMSNorm, convolution with SiLU, gated selective scan. CPU, float32.

The C++ file is compiled at first import with ``g++`` into a cache folder, under a name that follows from its text.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from speculative_mamba.ops.threads import num_threads

FLAGS = ["-O3", "-march=native", "-ffast-math", "-fPIC", "-shared", "-std=c++17", "-pthread"]


def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("scan.cpp")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "speculative_mamba"
    target = cache / f"scan-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / "scan.so"
            subprocess.run(["g++", *FLAGS, str(source), "-o", str(built)], check=True)
            built.replace(target)
    return ctypes.CDLL(str(target))


_LIBRARY = _library()
STATES, CHUNK, TAPS = (ctypes.c_int.in_dll(_LIBRARY, name).value for name in ("states", "chunk", "taps"))


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a function of the library; its last argument, the number of threads, is the package's."""
    converted: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.dtype == torch.float32 and argument.is_contiguous(), name
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif argument is None:
            converted.append(ctypes.c_void_p())
        else:
            converted.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument))
    getattr(_LIBRARY, name)(*converted, ctypes.c_int(num_threads()))


class RMSNorm(torch.autograd.Function):
    """x (rows, length, width), weight (width), eps -> (rows, length, width)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty(x.numel() // width)
        _call("rms_forward", x, weight, eps, y, scale, scale.numel(), width)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, scale = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        _call("rms_backward", x, weight, scale, dy.contiguous(), dx, dweight, scale.numel(), x.shape[-1])
        return dx, dweight, None


class ConvSiLU(torch.autograd.Function):
    """x (rows, length, width), weight (width, 1, 4), bias (width) -> silu(causal convolution), like x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight.squeeze(1).t().contiguous()
        u = torch.empty_like(x)
        _call("conv_forward", x, taps, bias, u, *x.shape)
        ctx.save_for_backward(x, taps, bias)
        return u

    @staticmethod
    def backward(ctx, du: Tensor):
        x, taps, bias = ctx.saved_tensors
        dx, dtaps, dbias = torch.empty_like(x), torch.zeros_like(taps), torch.zeros_like(bias)
        _call("conv_backward", x, taps, bias, du.contiguous(), dx, dtaps, dbias, *x.shape)
        return dx, dtaps.t().unsqueeze(1), dbias


class GatedScan(torch.autograd.Function):
    """u, raw, z (rows, length, width), bc (rows, length, 32), skip (width) -> y (rows, length, width).

    With dt = softplus(raw) and A[d, n] = -(n + 1): h = exp(dt A) h + dt u B, y = (C h + skip u) silu(z). h starts at
    zero or, without gradients, at ``state`` (rows, 16, width), which then receives the last h.
    """

    @staticmethod
    def forward(ctx, u: Tensor, raw: Tensor, bc: Tensor, skip: Tensor, z: Tensor, state: Tensor | None) -> Tensor:
        rows, length, width = u.shape
        assert width % 16 == 0 and bc.shape[-1] == 2 * STATES
        y = torch.empty_like(u)
        if state is not None:
            _call("scan_forward", u, raw, bc, skip, z, state, y, None, *u.shape)
            return y
        state, saved = u.new_zeros(rows, STATES, width), u.new_empty(rows, -(-length // CHUNK), STATES, width)
        _call("scan_forward", u, raw, bc, skip, z, state, y, saved, *u.shape)
        ctx.save_for_backward(u, raw, bc, skip, z, saved)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        u, raw, bc, skip, z, saved = ctx.saved_tensors
        du, draw, dbc, dz = (torch.empty_like(tensor) for tensor in (u, raw, bc, z))
        dskip = torch.zeros_like(skip)
        _call("scan_backward", u, raw, bc, skip, z, saved, dy.contiguous(), du, draw, dbc, dskip, dz, *u.shape)
        return du, draw, dbc, dskip, dz, None
