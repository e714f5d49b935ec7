"""What a draft is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...models.identity import IdentityKey
from ...models.runner import LanguageModel, RowState
from ...ops.commit_tokens import BatchState
from ..sampling import Sampler


@dataclass
class Proposal:
    """What was drafted for a batch.

    tokens: (B, k) int64. probs: (B, k, V) float32, the rows they were drawn from; None: they are certain.
    num_tokens: (B) int32, how many of a row's tokens count; None: all. Beyond its budget none does in any case.
    row_status: (k, B) int32, what ``Sampler.draft`` found at each step; None: nothing to complain of.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    row_status: torch.Tensor | None = None


class Draft(ABC):
    """Proposes tokens in the rounds of a batch.

    vocab_size: that of the target. capturable: whether ``propose`` can be in a CUDA graph: it runs the same operations
    on the same memory every time, and no value that it depends on is read by the host. stateful: it follows the text by
    being asked, so that after rounds without it a row is prefilled again from its ``snapshot``. recordable: whether
    ``propose`` can be recorded: it is capturable, and calls PyTorch by ``torch_op`` alone. model: whose weights it
    reads. layers: that model's cache. text: (B, L) int64, where committed tokens are written for it.
    """

    vocab_size: int
    capturable: bool = False
    stateful: bool = False
    recordable: bool = False
    model: LanguageModel | None = None
    layers: Sequence = ()
    text: torch.Tensor | None = None

    @abstractmethod
    def allocate(self, batch: int, lookahead: int, sampler: Sampler, *, captured: bool) -> "Draft":
        """One with memory of its own for so many rows and at most so many tokens a round. ``sampler`` draws tokens.
        captured: its rounds are captured as a whole, so nothing in them should be recorded by itself."""

    @abstractmethod
    def prefill(self, row: int, text: list[int], state: RowState | None = None) -> None:
        """A row, whatever it held before, goes on in slot 0 from this text, of which ``state`` has read some."""

    def before_propose(self, lookahead: int) -> list[int]:
        """What is done before each ``propose`` that is recorded. Returns where its memory lies that may move."""
        return []

    def ready(self) -> None:  # noqa: B027 - most have nothing to do
        """All rows that have come since the last round are prefilled."""

    @abstractmethod
    def propose(self, state: BatchState, lookahead: int) -> Proposal:
        """Up to ``lookahead`` tokens a row behind its text, of which ``state`` tells the end."""

    def snapshot(self, row: int, slot: int, text: list[int]) -> RowState | None:
        """A copy of what it has in mind of a text that ended in this slot when it was last asked.

        slot: as ``state.slots[0]`` tells it where the row goes on; 0 after ``prefill``.
        """
        return None

    def reserve(self, entries: int) -> bool:
        """Makes memory for texts of so many tokens. Whether anything moved."""
        return False

    def tensors(self) -> list[torch.Tensor]:
        """Its memory."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def identity(self) -> tuple:
        """Drafts that are equal by this can have the same captured rounds."""
        return IdentityKey(self), IdentityKey(self.model)
