"""An op on one set of buffers: what is timed, what it must move, and what it must equal."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from speculative_mamba.ops.block_weight import BlockWeight

ACTIVATIONS = torch.bfloat16


class Work(ABC):
    """moved: bytes that a call must read or write, each counted once. launches: kernels that backend "cuda" starts for
    a call. On device "meta" a work has sizes but no memory.
    """

    moved: int
    launches: int = 1

    @abstractmethod
    def run(self, backend: str) -> object:
        """One call, without a wait for the device."""

    @abstractmethod
    def check(self, backend: str) -> None:
        """Of a fresh work. Raises AssertionError where the call is wrong: it is not to be timed then."""

    @abstractmethod
    def baselines(self) -> dict[str, Callable[[], object]]:
        """Others that do the same: "torch", and where it is installed "mamba_ssm"."""


class WindowWork(Work):
    """Of an op that takes a window of ``tokens`` tokens per row in their order."""

    tokens: int

    @abstractmethod
    def one_by_one(self, backend: str) -> list[torch.Tensor]:
        """The same tokens in calls of one, as without a draft."""


def nbytes(*tensors: torch.Tensor | BlockWeight | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def activations(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=ACTIVATIONS)


def outer_rows(batch: int) -> list[int]:
    """Rows that are compared with the reference, which is slow: the first and the last."""
    return sorted({0, batch - 1})


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Both were computed in float32; a result of 16 bits may have been rounded to either side."""
    tolerance = 1e-4 if actual.dtype is torch.float32 else 2**-7 if actual.dtype is torch.bfloat16 else 2**-10
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < tolerance, f"{what}: relative error {error:.2e} against the reference, allowed {tolerance:.1e}"
