"""Muon: momentum whose matrices are made nearly orthogonal before the step. Equal shapes go through as one batch."""

from collections import defaultdict

import torch
from torch import Tensor

MOMENTUM = 0.95
WEIGHT_DECAY = 0.1
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """matrices (count, rows, columns) float32 -> the same with all singular values near 1 (Newton-Schulz)."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Parameters (rows, columns) float32. Steps have the root mean square 0.2 ``lr``, about that of AdamW."""

    def __init__(self, parameters: list[Tensor], lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for (rows, columns), parameters in shapes.items():
                gradients = torch.stack([parameter.grad for parameter in parameters])
                for parameter in parameters:
                    self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                torch._foreach_lerp_(momenta, list(gradients.unbind()), 1 - MOMENTUM)
                updates = orthogonalised(torch.lerp(gradients, torch.stack(momenta), MOMENTUM))
                torch._foreach_mul_(parameters, 1 - group["lr"] * WEIGHT_DECAY)
                scale = 0.2 * max(rows, columns) ** 0.5
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-scale * group["lr"])
