"""The ops that choose tokens. Their public functions also wait for the device, to learn whether a row has a token; that
wait is not timed."""

from abc import abstractmethod
from collections.abc import Callable

import torch

from speculative_mamba.ops import commit_tokens
from speculative_mamba.ops.backend import run
from speculative_mamba.ops.commit_tokens import BatchState, Record
from speculative_mamba.ops.noise import Purpose
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors
from speculative_mamba.ops.speculative_accept import SpeculativeAcceptArgs

from . import updates
from .work import Work, nbytes, outer_rows

FILTERS = {
    "top-k+top-p": SamplingParams(0.8, 50, 0.8),
    "greedy": SamplingParams(),
    "top-p": SamplingParams(0.8, 0, 0.9),
    "no filter": SamplingParams(1.0),
}


class Choice(Work):
    """Logits, and the noise's keys and positions: a stream of its own for every row."""

    def __init__(self, logits: torch.Tensor, params: SamplingParams) -> None:
        batch, device = len(logits), logits.device
        self.logits, self.params = logits, params
        self.sampling = SamplingTensors.from_params([params] * batch, logits.shape[-1], device)
        self.rng_keys = torch.stack([torch.zeros(batch, device=device), torch.arange(batch, device=device)], 1).long()
        self.positions = torch.full((batch,), 100, device=device)
        self.launches = 2  # a reduction of all logits, and a block for each position

    def check(self, backend: str) -> None:
        """The first and the last row choose among all what the reference chooses for them alone."""
        chosen = self.run(backend)
        assert not chosen[-1].any(), f"row_status {chosen[-1].tolist()}"
        for row in outer_rows(len(self.logits)):
            alone = slice(row, row + 1)
            found = [part[alone].tolist() for part in chosen]
            expected = [part.tolist() for part in self.of_rows(alone, "reference")]
            assert found == expected, f"row {row}: chose {found}, the reference {expected}"

    def run(self, backend: str) -> tuple[torch.Tensor, ...]:
        return self.of_rows(slice(None), backend)

    def choose(
        self,
        rows: slice,
        backend: str,
        logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        draft_probs: torch.Tensor | None,
        purpose: Purpose,
        target_probs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """What ``rows`` choose by their logits (B, K+1, V)."""
        args = SpeculativeAcceptArgs(
            logits, draft_tokens, draft_probs, self.sampling.rows_of(rows), self.rng_keys[rows], self.positions[rows],
            False, None, None, None, None, purpose=int(purpose), target_probs=target_probs,
        )  # fmt: skip
        return run("speculative_accept", backend, args)

    @abstractmethod
    def of_rows(self, rows: slice, backend: str) -> tuple[torch.Tensor, ...]:
        """What is chosen, and last the row status."""


class Sample(Choice):
    """sample_tokens, which leaves the probabilities for a later test unless the choice is greedy."""

    def __init__(self, vocabulary: int, params: SamplingParams, batch: int, device: torch.device) -> None:
        super().__init__(3 * torch.randn(batch, vocabulary, device=device), params)
        self.probs = None if params.greedy else torch.empty_like(self.logits)
        self.draft_tokens = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.moved = nbytes(self.logits, self.probs)

    def of_rows(self, rows: slice, backend: str) -> tuple[torch.Tensor, ...]:
        probs = None if self.probs is None else self.probs[rows]
        return self.choose(rows, backend, self.logits[rows, None], self.draft_tokens[rows], None, Purpose.DRAFT, probs)

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: updates.sample(self.logits, self.params)}


class Accept(Choice):
    """speculative_accept of drafts that are all right, so that every position is looked at."""

    def __init__(self, vocabulary: int, params: SamplingParams, batch: int, tokens: int, device: torch.device) -> None:
        super().__init__(3 * torch.randn(batch, tokens, vocabulary, device=device), params)
        drafting = self.logits[:, :-1]
        self.draft_probs = None if params.greedy else updates.probs_of(drafting, params)
        self.draft_tokens = drafting.argmax(-1) if params.greedy else updates.draw(self.draft_probs)
        self.moved = self.logits.nbytes
        self.launches += tokens > 1  # the first rejection

    def of_rows(self, rows: slice, backend: str) -> tuple[torch.Tensor, ...]:
        probs = None if self.draft_probs is None else self.draft_probs[rows]
        return self.choose(rows, backend, self.logits[rows], self.draft_tokens[rows], probs, Purpose.TOKEN)

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: updates.accept(self.logits, self.draft_tokens, self.draft_probs, self.params)}


class Commit(Work):
    """commit_tokens of windows whose drafted tokens were all accepted."""

    def __init__(self, vocabulary: int, batch: int, tokens: int, device: torch.device) -> None:
        def integers(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        lookahead, i32 = tokens - 1, torch.int32
        self.window = [
            integers(7, batch, lookahead), integers(lookahead, batch, dtype=i32), integers(9, batch),
            integers(0, batch, dtype=i32), integers(0, lookahead, batch, dtype=i32),
            integers(lookahead, batch, dtype=i32), integers(0, batch, vocabulary, dtype=torch.bool),
        ]  # fmt: skip
        self.state = BatchState(
            integers(1, batch, 2), integers(100, batch), integers(1 << 30, batch, dtype=i32),
            integers(1, batch, dtype=torch.bool), integers(0, tokens, batch, dtype=i32),
        )  # fmt: skip
        per_row = nbytes(*self.window[:-1], *vars(self.state).values()) + batch * tokens  # and who is a stop token
        self.moved = per_row + batch * 8 * (tokens + Record.TOKENS)

    def run(self, backend: str) -> object:
        return commit_tokens(*self.window, self.state, backend=backend)

    def check(self, backend: str) -> None:
        expected = BatchState(*(tensor.clone() for tensor in vars(self.state).values()))
        record = commit_tokens(*self.window, expected, backend="reference")
        assert torch.equal(self.run(backend), record), "another record than the reference"
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(self.state, name), tensor), f"{name}: not that of the reference"

    def baselines(self) -> dict[str, Callable[[], object]]:
        draft_tokens, accepted, next_token, *_, is_stop = self.window
        return {"torch": lambda: updates.commit(draft_tokens, accepted, next_token, is_stop, self.state)}
