"""The activation of an MLP in Triton."""

import torch
import triton
import triton.language as tl

from ..triton_math import launch, narrow, silu, widen
from . import ACTIVATIONS, MlpActivationArgs

FEATURES = 512  # of a program


@triton.jit
def _activate(gate, up, y, gate_row_stride, up_row_stride, features, RELU2: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(features, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    feature = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = feature < features
    g = widen(tl.load(gate + row * gate_row_stride + feature, exists))
    if RELU2:
        g = tl.where(g < 0, 0.0, g)  # a NaN stays one
        value = g * g
    else:
        value = silu(g)
    if up is not None:
        value *= widen(tl.load(up + row * up_row_stride + feature, exists))
    tl.store(y + row * features + feature, narrow(value, y.dtype.element_ty), exists)


def mlp_activation(args: MlpActivationArgs) -> torch.Tensor:
    gate, up = args.gate, args.up
    rows, features = gate.shape
    y = gate.new_empty(rows, features)
    launch(
        _activate, rows * triton.cdiv(features, FEATURES), y, 4, gate=gate, up=up, y=y,
        gate_row_stride=gate.stride(0), up_row_stride=0 if up is None else up.stride(0), features=features,
        RELU2=ACTIVATIONS[args.activation] == "relu2", BLOCK=FEATURES,
    )  # fmt: skip
    return y
