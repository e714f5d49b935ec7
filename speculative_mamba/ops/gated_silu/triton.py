"""The gate of an MLP in Triton."""

import torch
import triton
import triton.language as tl

from ..triton_math import launch, narrow, silu, widen
from . import GatedSiluArgs

FEATURES = 512  # of a program


@triton.jit
def _multiply(gate, up, y, gate_row_stride, up_row_stride, features, BLOCK: tl.constexpr):
    blocks = tl.cdiv(features, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    feature = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = feature < features
    g = widen(tl.load(gate + row * gate_row_stride + feature, exists))
    u = widen(tl.load(up + row * up_row_stride + feature, exists))
    tl.store(y + row * features + feature, narrow(silu(g) * u, y.dtype.element_ty), exists)


def gated_silu(args: GatedSiluArgs) -> torch.Tensor:
    gate, up = args
    rows, features = gate.shape
    y = gate.new_empty(rows, features)
    launch(
        _multiply, rows * triton.cdiv(features, FEATURES), y, 4, gate=gate, up=up, y=y,
        gate_row_stride=gate.stride(0), up_row_stride=up.stride(0), features=features, BLOCK=FEATURES,
    )  # fmt: skip
    return y
