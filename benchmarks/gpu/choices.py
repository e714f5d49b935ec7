"""The ops that choose tokens. Their public functions also wait for the device, to learn whether a row has a law; that
wait is not timed."""

from abc import abstractmethod
from collections.abc import Callable

import torch

from speculative_mamba.ops import commit_tokens
from speculative_mamba.ops.backend import run
from speculative_mamba.ops.commit_tokens import BatchState
from speculative_mamba.ops.filters import Filters
from speculative_mamba.ops.noise import Purpose

from . import updates
from .work import Work, nbytes, outer_rows

FILTERS = {
    "top-k+top-p": Filters(0.8, 50, 0.8),
    "greedy": Filters(),
    "top-p": Filters(0.8, 0, 0.9),
    "no filter": Filters(1.0),
}


class Choice(Work):
    """Logits, and the noise's keys and positions: a stream of its own for every row."""

    def __init__(self, logits: torch.Tensor, filters: Filters) -> None:
        batch, device = len(logits), logits.device
        self.logits, self.filters = logits, filters
        self.keys = torch.stack([torch.zeros(batch, device=device), torch.arange(batch, device=device)], 1).long()
        self.positions = torch.full((batch,), 100, device=device)
        # A survey and an answer; where many tokens are kept also a race and, with top-p, where it ends.
        self.launches = 2 if filters.greedy or filters.top_k else 3 if filters.top_p == 1 else 5

    def check(self, backend: str) -> None:
        """The first and the last row choose among all what the reference chooses for them alone."""
        chosen = self.run(backend)
        assert not chosen[-1].any(), f"verdicts {chosen[-1].tolist()}"
        for row in outer_rows(len(self.logits)):
            alone = slice(row, row + 1)
            found = [part[alone].tolist() for part in chosen]
            expected = [part.tolist() for part in self.of_rows(alone, "reference")]
            assert found == expected, f"row {row}: chose {found}, the reference {expected}"

    def run(self, backend: str) -> tuple[torch.Tensor, ...]:
        return self.of_rows(slice(None), backend)

    @abstractmethod
    def of_rows(self, rows: slice, backend: str) -> tuple[torch.Tensor, ...]:
        """What is chosen, and last the verdicts."""


class Sample(Choice):
    """sample_tokens, which leaves the law for a later test unless the choice is greedy."""

    def __init__(self, vocabulary: int, filters: Filters, batch: int, device: torch.device) -> None:
        super().__init__(3 * torch.randn(batch, vocabulary, device=device), filters)
        self.laws = None if filters.greedy else torch.empty_like(self.logits)
        self.recent = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.moved = nbytes(self.logits, self.laws)

    def of_rows(self, rows: slice, backend: str) -> tuple[torch.Tensor, ...]:
        laws = None if self.laws is None else self.laws[rows]
        parts = self.keys[rows], self.positions[rows], int(Purpose.DRAFT), laws, None, self.recent[rows], None
        return run("sample_tokens", backend, self.logits[rows], self.filters, *parts)

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: updates.sample(self.logits, self.filters)}


class Accept(Choice):
    """speculative_accept of drafts that are all right, so that every position is looked at."""

    def __init__(self, vocabulary: int, filters: Filters, batch: int, tokens: int, device: torch.device) -> None:
        super().__init__(3 * torch.randn(batch, tokens, vocabulary, device=device), filters)
        drafting = self.logits[:, :-1]
        self.laws = None if filters.greedy else updates.law(drafting, filters)
        self.drafted = drafting.argmax(-1) if filters.greedy else updates.draw(self.laws)
        self.moved = self.logits.nbytes
        self.launches += not filters.greedy  # the first refusal

    def of_rows(self, rows: slice, backend: str) -> tuple[torch.Tensor, ...]:
        laws = None if self.laws is None else self.laws[rows]
        parts = self.drafted[rows], laws, self.filters, self.keys[rows], self.positions[rows], False, None, None, None
        return run("speculative_accept", backend, self.logits[rows], *parts)

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: updates.accept(self.logits, self.drafted, self.laws, self.filters)}


class Commit(Work):
    """commit_tokens of windows whose drafted tokens were all accepted."""

    def __init__(self, vocabulary: int, batch: int, tokens: int, device: torch.device) -> None:
        def whole(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        lookahead, i32 = tokens - 1, torch.int32
        self.window = [
            whole(7, batch, lookahead), whole(lookahead, batch, dtype=i32), whole(9, batch), whole(0, batch, dtype=i32),
            whole(lookahead, batch, dtype=i32), whole(0, vocabulary, dtype=torch.bool),
        ]  # fmt: skip
        self.rows = BatchState(
            whole(1, batch, 2), whole(100, batch), whole(1 << 30, batch, dtype=i32),
            whole(1, batch, dtype=torch.bool), whole(0, tokens, batch, dtype=i32),
        )  # fmt: skip
        per_row = nbytes(*self.window[:-1], *vars(self.rows).values()) + batch * tokens  # and who is a stop token
        self.moved = per_row + batch * 8 * (tokens + 4)

    def run(self, backend: str) -> object:
        return commit_tokens(*self.window, self.rows, backend=backend)

    def check(self, backend: str) -> None:
        expected = BatchState(*(tensor.clone() for tensor in vars(self.rows).values()))
        record = commit_tokens(*self.window, expected, backend="reference")
        assert torch.equal(self.run(backend), record), "another record than the reference"
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(self.rows, name), tensor), f"{name}: not that of the reference"

    def baselines(self) -> dict[str, Callable[[], object]]:
        drafted, accepted, following, _, _, is_stop = self.window
        return {"torch": lambda: updates.commit(drafted, accepted, following, is_stop, self.rows)}
