"""How tokens are drawn: the user's parameters, and the sampler that applies them to a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..ops import sample_tokens, speculative_accept
from ..ops.filters import Filters, is_whole
from ..ops.noise import Purpose

# (row, the text so far, logits (V) of the next token) -> logits (V); see ``generate``.
LogitsProcessor = Callable[[int, list[int], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SamplingParams(Filters):
    """How the next token is drawn: ``Filters`` and a seed. The defaults are greedy.

    seed: a whole number from 0 to 2^63-1, or one per row. Random numbers are a function of (seed, row, position in the
    text, token), so a row's numbers depend neither on other rows nor on the draft, and no global generator is touched.
    With a seed per row, a row uses the numbers that it would use alone with that seed.

    Raises:
        ValueError: a value is out of range.
    """

    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, (list, tuple)):
            object.__setattr__(self, "seed", tuple(self.seed))
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            if not is_whole(seed) or not 0 <= seed < 2**63:
                raise ValueError(f"seed must be a whole number from 0 to 2^63-1, or one per row, got {self.seed!r}")

    def keys(self, rows: int) -> torch.Tensor:
        """Seed and stream of each row, (rows, 2) int64."""
        if isinstance(self.seed, tuple):
            return torch.tensor([[seed, 0] for seed in self.seed])
        return torch.tensor([[self.seed, row] for row in range(rows)])


class Sampler:
    """Chooses tokens for a batch, the draft's and the target's, round by round.

    ``begin_round`` comes first in a round; then ``draft`` draws any number of tokens, and ``accept`` tests them.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        rows: int,
        vocabulary: int,
        *,
        acceptance: str = "rejection",
        processor: LogitsProcessor | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        self.sampling = sampling
        self.coupled = acceptance == "coupled"
        self._processor, self._backend = processor, backend
        self._keys = sampling.keys(rows).to(device)
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self._known = [0] * rows
        self.begin_round([[]] * rows, [])

    def begin_round(self, texts: list[list[int]], active: list[int]) -> None:
        """texts: each row's committed tokens. active: the rows that are still generating."""
        self._texts, self._rows = texts, active
        device = self._keys.device
        self._positions = torch.tensor([len(text) for text in texts], device=device)
        self._active = None  # all rows
        if len(active) < len(texts):
            self._active = torch.zeros(len(texts), dtype=torch.bool, device=device)
            self._active[active] = True
        for row in active if self._seen is not None else ():
            self._seen[row, texts[row][self._known[row] :]] = True
            self._known[row] = len(texts[row])

    def draft(self, logits: torch.Tensor, drafted: torch.Tensor, laws: torch.Tensor | None) -> torch.Tensor:
        """A draft's next token for each row.

        logits: (B, V) float32 of the draft. drafted: (B, k) int64, its tokens of this round so far. laws: (B, V)
        float32 or None, written: the law each token was drawn from. Returns tokens (B) int64.

        Raises:
            ValueError: a row has no law.
        """
        if self._processor is not None:
            logits = logits.clone()
            for row in self._rows:
                logits[row] = self._process(row, drafted[row].tolist(), logits[row])
        purpose = Purpose.TOKEN if self.coupled else Purpose.DRAFT
        recent = None if self._seen is None else drafted.contiguous()
        try:
            return sample_tokens(
                logits, self.sampling, self._keys, self._positions + drafted.shape[1], purpose, laws=laws,
                seen=self._seen, recent=recent, active=self._active, backend=self._backend,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"the draft cannot propose a token: {error}") from None

    def accept(
        self, logits: torch.Tensor, drafted: torch.Tensor, laws: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``speculative_accept`` for the rows of this round. logits: (B, K+1, V) float32 of the target.

        Raises:
            ValueError: logits or laws that matter are broken.
        """
        if self._processor is not None:
            logits = self._processed(logits, drafted)
        return speculative_accept(
            logits, drafted.contiguous(), laws, self.sampling, self._keys, self._positions, coupled=self.coupled,
            seen=self._seen, active=self._active, backend=self._backend,
        )  # fmt: skip

    def _processed(self, logits: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for row in self._rows:
            tokens = drafted[row].tolist()
            for position in range(len(tokens) + 1):
                logits[row, position] = self._process(row, tokens[:position], logits[row, position])
                # A token that is impossible now ends the window: the text behind it will never be.
                if position < len(tokens) and logits[row, position, tokens[position]] == -torch.inf:
                    break
        return logits

    def _process(self, row: int, drafted: list[int], logits: torch.Tensor) -> torch.Tensor:
        processed = self._processor(row, self._texts[row] + drafted, logits.clone())
        if not isinstance(processed, torch.Tensor) or processed.shape != logits.shape:
            what = tuple(processed.shape) if isinstance(processed, torch.Tensor) else type(processed).__name__
            raise ValueError(f"logits_processor must return logits of shape {tuple(logits.shape)}, got {what}")
        return processed
