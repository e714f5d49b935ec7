"""How tokens are chosen: the sampler that applies the user's parameters to a batch."""

from collections.abc import Callable, Sequence

import torch

from ..ops import sample_tokens, speculative_accept
from ..ops.noise import Purpose
from ..ops.sampling_params import SamplingParams
from ..ops.sampling_tensors import SamplingTensors

__all__ = ["LogitsProcessor", "Sampler", "SamplingParams"]

# (row, the text so far, logits (V) of the next token) -> logits (V); see ``generate``.
LogitsProcessor = Callable[[int, list[int], torch.Tensor], torch.Tensor]

_MIN_BIAS_CAPACITY = 16


class Sampler:
    """Chooses tokens for a batch, the draft's and the target's.

    positions: (B) int64, of each row's next token. active: (B) bool, the rows that are generating. prompt_mask, (B, V)
    bool, and output_counts, (B, V) int32: what each text holds, or None without penalties. They are the device's: what
    commits tokens moves them on. With ``every_mix`` there is memory for whatever ``set_params`` may ask for later.
    """

    def __init__(
        self,
        sampling: Sequence[SamplingParams],
        vocabulary: int,
        *,
        acceptance: str = "rejection",
        processor: LogitsProcessor | None = None,
        every_mix: bool = False,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        rows = len(sampling)
        self.backend, self.coupled = backend, acceptance == "coupled"
        self.draws = every_mix or not all(params.greedy for params in sampling)
        self._vocabulary, self._capacity = vocabulary, bias_capacity(sampling) if every_mix else 0
        self.tensors = SamplingTensors.from_params(
            sampling, vocabulary, device, penalties=every_mix, bias_capacity=self._capacity
        )
        self.rng_keys = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.prompt_mask = self.output_counts = None
        if self.tensors.has_penalties:
            self.prompt_mask = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
            self.output_counts = torch.zeros(rows, vocabulary, dtype=torch.int32, device=device)
        self._processor = processor
        self.follow([[]] * rows, [])

    def begin(self, texts: Sequence[Sequence[int]]) -> None:
        """All rows go on from these tokens, their prompts."""
        device = self.rng_keys.device
        self.positions.copy_(torch.tensor([len(text) for text in texts], device=device))
        self.active.fill_(True)
        if self.prompt_mask is not None:
            self.prompt_mask.zero_()
            self.output_counts.zero_()
            for row, text in enumerate(texts):
                self.prompt_mask[row, torch.tensor(text, device=device)] = True

    def set_params(self, sampling: Sequence[SamplingParams], rng_keys: torch.Tensor) -> None:
        """Parameters, seeds and streams (B, 2) of what follows."""
        self.tensors.copy_(
            SamplingTensors.from_params(
                sampling, self._vocabulary, penalties=self.tensors.has_penalties, bias_capacity=self._capacity
            )
        )
        self.rng_keys.copy_(rng_keys)

    def follow(self, texts: list[list[int]], rows: list[int]) -> None:
        """What a logits processor is told: all committed tokens, and the rows that are generating."""
        self._texts, self._rows = texts, rows

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
            for row in self._rows:
                logits[row] = self._process(row, drafted[row].tolist(), logits[row])
        purpose = Purpose.TOKEN if self.coupled else Purpose.DRAFT
        draft_tokens = None if self.output_counts is None else drafted.contiguous()
        try:
            return sample_tokens(
                logits, self.tensors, self.rng_keys, self.positions + drafted.shape[1], purpose, probs=laws,
                draft_tokens=draft_tokens, prompt_mask=self.prompt_mask, output_counts=self.output_counts,
                active=self.active, row_status=verdicts, backend=self.backend,
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
            logits = self._processed(logits, drafted)
        return speculative_accept(
            logits, drafted.contiguous(), laws, self.tensors, self.rng_keys, self.positions, coupled=self.coupled,
            prompt_mask=self.prompt_mask, output_counts=self.output_counts, active=self.active,
            num_draft_tokens=limits, row_status=verdicts, backend=self.backend,
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


def bias_capacity(sampling: Sequence[SamplingParams]) -> int:
    """Biased tokens of a row that there is memory for, so that few captured rounds serve all calls: a power of two."""
    return max(_MIN_BIAS_CAPACITY, 1 << (max(len(params.logit_bias) for params in sampling) - 1).bit_length())


def of_rows(
    sampling: SamplingParams | Sequence[SamplingParams], rows: int
) -> tuple[list[SamplingParams], torch.Tensor]:
    """Parameters of each row, and their seeds and streams (B, 2)."""
    if isinstance(sampling, SamplingParams):
        return [sampling] * rows, sampling.rng_keys(rows)
    return list(sampling), torch.tensor([[params.seed, 0] for params in sampling])
