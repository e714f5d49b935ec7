"""A draft that agrees with the target as often as it is told to."""

import copy
import random
from collections.abc import Callable

import torch

from ..decode.drafts import Draft, Proposal
from ..decode.sampling import Sampler
from ..models.runner import RowState
from ..ops.commit_tokens import BatchState


class ScriptedDraft:
    """Proposes tokens of a known text, right or wrong as ``agree(row, position)`` says.

    texts: per row the whole sequence that the target will produce, prompt included. position counts from the start of
    that sequence.
    """

    def __init__(self, texts: list[list[int]], vocab_size: int, agree: Callable[[int, int], bool]) -> None:
        self.vocab_size = vocab_size
        self._texts, self._agree = texts, agree

    def begin(self, prompts: list[list[int]], lookahead: int, sampler: Sampler) -> None: ...

    def propose(
        self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        proposals = []
        for index, row in enumerate(rows):
            positions = range(len(row), len(row) + lookahead)
            proposals.append([self._token(index, position) for position in positions])
        return torch.tensor(proposals, dtype=torch.int64, device="cpu"), None

    def _token(self, row: int, position: int) -> int:
        text = self._texts[row]
        right = text[position] if position < len(text) else 0
        return right if self._agree(row, position) else (right + 1) % self.vocab_size


class CapturableScript(Draft):
    """The same on the device, for rounds that are captured.

    cost: a draft that runs for each proposal and whose tokens are thrown away, so that the time of a real one is in the
    figure.
    """

    capturable = True

    def __init__(
        self,
        texts: list[list[int]],
        vocab_size: int,
        agree: Callable[[int, int], bool],
        device: torch.device | str = "cpu",
        cost: Draft | None = None,
    ) -> None:
        self.vocab_size, self._cost = vocab_size, cost
        self.model = None if cost is None else cost.model
        rows = []
        for row, text in enumerate(texts):
            rows.append([token if agree(row, at) else (token + 1) % vocab_size for at, token in enumerate(text)])
        longest = max(map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]
        self._proposals = torch.tensor(padded, dtype=torch.int64, device=device)

    def allocate(self, batch: int, lookahead: int, sampler: Sampler, *, captured: bool) -> "CapturableScript":
        allocated = copy.copy(self)
        if self._cost is not None:
            allocated._cost = self._cost.allocate(batch, lookahead, sampler, captured=captured)
            allocated.layers = allocated._cost.layers
        return allocated

    def reserve(self, entries: int) -> bool:
        return self._cost is not None and self._cost.reserve(entries)

    def prefill(self, row: int, text: list[int], state: RowState | None = None) -> None:
        if self._cost is not None:
            self._cost.prefill(row, text)

    def propose(self, state: BatchState, lookahead: int) -> Proposal:
        if self._cost is not None:
            self._cost.propose(state, lookahead)
        device = state.positions.device
        at = state.positions[:, None] + torch.arange(lookahead, dtype=torch.int64, device=device)
        tokens = self._proposals.gather(1, at.clamp(max=self._proposals.shape[1] - 1))
        return Proposal(tokens)


def agree_at_rate(rate: float, seed: int = 0) -> Callable[[int, int], bool]:
    """Agreement drawn anew for every drafted token."""
    source = random.Random(seed)
    return lambda row, position: source.random() < rate
