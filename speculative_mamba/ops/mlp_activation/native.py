"""Binding to csrc/cpu/mlp_activation.cpp and csrc/cuda/mlp_activation.cu."""

import torch

from ..backend import compiled
from ..recording import new_result
from . import MlpActivationArgs


def mlp_activation(args: MlpActivationArgs) -> torch.Tensor:
    gate = args.gate
    rows, features = gate.shape
    y = new_result(gate, rows, features)
    kernels, where = compiled(gate)
    kernels.mlp_activation(args, where, activations=gate.dtype, rows=rows, features=features, y=y)
    return y
