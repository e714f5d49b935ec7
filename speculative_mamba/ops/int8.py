"""A weight matrix in int8, one scale per row."""

from dataclasses import dataclass

import torch

_CHUNK = 1 << 17  # weights converted at a time
_LARGEST = 127


@dataclass(frozen=True)
class Int8Weight:
    """A matrix whose row n is ``scale[n] * values[n]``: values (N, K) int8, scale (N) float32."""

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (M) int64 → (M, K) float32, as an embedding looks them up."""
        return self.values[ids].float() * self.scale[ids, None]


def quantised(weight: torch.Tensor) -> Int8Weight:
    """The nearest int8 matrix: weight (N, K) of any float dtype; scale[n] = max |weight[n]| / 127.

    Values are rounded to nearest, ties to even, so that no weight moves by more than half its row's scale. A row of
    zeros gets the smallest normal number as its scale. A few rows are converted at a time: no copy in float is made.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].float()
        largest = torch.linalg.vector_norm(rows, torch.inf, 1) if rows.numel() else rows.new_zeros(len(rows))
        if not largest.isfinite().all():
            raise ValueError("a weight that is NaN or infinite cannot be int8")
        scale[first : first + step] = (largest / _LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        values[first : first + step] = (rows / scale[first : first + step, None]).round_()
    return Int8Weight(values, scale)
