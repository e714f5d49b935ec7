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
            streams = [[seed, 0] for seed in self.seed]
        else:
            streams = [[self.seed, row] for row in range(rows)]
        return torch.tensor(streams, dtype=torch.int64, device="cpu")


class Sampler:
    """Chooses tokens for a batch, the draft's and the target's.

    positions: (B) int64, of each row's next token. active: (B) bool, the rows that are generating. seen: (B, V) bool,
    tokens of each text, or None without a repetition penalty. They are the device's: what commits tokens moves them on.
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
        self.sampling, self.backend = sampling, backend
        self.coupled = acceptance == "coupled"
        self.keys = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self._processor = processor
        self.forget()

    def begin(self, texts: Sequence[Sequence[int]]) -> None:
        """All rows go on from these tokens."""
        device = self.keys.device
        self.positions.copy_(torch.tensor([len(text) for text in texts], dtype=torch.int64, device=device))
        self.active.fill_(True)
        if self.seen is not None:
            self.seen.zero_()
            for row, text in enumerate(texts):
                self.seen[row, torch.tensor(text, dtype=torch.int64, device=device)] = True

    def reseed(self, sampling: SamplingParams) -> None:
        """The seed of what follows; the other parameters must be those from before."""
        self.keys.copy_(sampling.keys(len(self.keys)))

    def follow(self, texts: dict[int, list[int]], ends: Callable[[int, list[int]], bool]) -> None:
        """What a logits processor is told: the committed tokens of the rows that are generating, and whether a row's
        text is complete with some further tokens, so that nobody is asked what comes after them."""
        self._texts, self._ends = texts, ends

    def forget(self) -> None:
        """No row is generating: nothing of a call is held after it."""
        self.follow({}, _goes_on)

    def draft(
        self,
        logits: torch.Tensor,
        drafted: torch.Tensor,
        laws: torch.Tensor | None,
        verdicts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A draft's next token for each row.

        logits: (B, V) float32 of the draft. drafted: (B, k) int64, its tokens of this round so far. laws: (B, V)
        float32 or None, written: the law each token was drawn from. verdicts: (B) int32 or None, written instead of an
        error. Returns tokens (B) int64.

        Raises:
            ValueError: a row has no law.
        """
        if self._processor is not None:
            logits = logits.clone()
            for row in self._texts:
                tokens = drafted[row].tolist()
                if not self._ends(row, tokens):
                    logits[row] = self._process(row, tokens, logits[row])
        purpose = Purpose.TOKEN if self.coupled else Purpose.DRAFT
        recent = None if self.seen is None else drafted.contiguous()
        try:
            return sample_tokens(
                logits, self.sampling, self.keys, self.positions + drafted.shape[1], purpose, laws=laws,
                seen=self.seen, recent=recent, active=self.active, verdicts=verdicts, backend=self.backend,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"the draft cannot propose a token: {error}") from None

    def accept(
        self,
        logits: torch.Tensor,
        drafted: torch.Tensor,
        laws: torch.Tensor | None,
        *,
        limits: torch.Tensor | None = None,
        verdicts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``speculative_accept`` for the rows that are generating. logits: (B, K+1, V) float32 of the target.

        Raises:
            ValueError: logits or laws that matter are broken, and no ``verdicts`` are asked for.
        """
        if self._processor is not None:
            logits = self._processed(logits, drafted, limits)
        return speculative_accept(
            logits, drafted.contiguous(), laws, self.sampling, self.keys, self.positions, coupled=self.coupled,
            seen=self.seen, active=self.active, limits=limits, verdicts=verdicts, backend=self.backend,
        )  # fmt: skip

    def _processed(self, logits: torch.Tensor, drafted: torch.Tensor, limits: torch.Tensor | None) -> torch.Tensor:
        logits = logits.clone()
        counts = [drafted.shape[1]] * len(drafted) if limits is None else limits.tolist()
        for row in self._texts:
            tokens = drafted[row, : counts[row]].tolist()
            for position in range(len(tokens) + 1):
                if self._ends(row, tokens[:position]):
                    logits[row, position] = 0  # harmless, and never drawn from
                    break
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


def _goes_on(row: int, tokens: list[int]) -> bool:
    return False
