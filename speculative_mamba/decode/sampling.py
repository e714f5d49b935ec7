"""How tokens are chosen: the sampler that applies each row's parameters."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..ops import sample_tokens, speculative_accept
from ..ops.commit_tokens import BatchState
from ..ops.noise import Purpose
from ..ops.recording import torch_op
from ..ops.sampling_params import SamplingParams
from ..ops.sampling_tensors import SamplingTensors

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["LogitsProcessor", "Sampler", "SamplingParams"]

# (row, the text so far, logits (V) of the next token) -> logits (V); see ``generate``.
LogitsProcessor = Callable[[int, list[int], torch.Tensor], torch.Tensor]

_MIN_BIAS_CAPACITY = 16
MAX_BIASED = 512  # tokens of a row, where nobody says how many


class Sampler:
    """Chooses tokens for a batch, the draft's and the target's.

    params: those of all rows to come; None: any may come. state: where the rows stand. prompt_mask, (B, V) bool, and
    output_counts, (B, V) int32: what each text holds, or None without penalties; what commits tokens moves them on.
    With ``every_mix`` there is memory for whatever ``admit`` may ask for later, else for these parameters. texts: those
    that ``processor`` is told of.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams] | None,
        vocab_size: int,
        state: BatchState,
        *,
        coupled: bool = False,
        every_mix: bool = False,
        backend: str = "auto",
        processor: LogitsProcessor | None = None,
        texts: "Batch | None" = None,
    ) -> None:
        batch, device = len(state.positions), state.positions.device
        self.backend, self.coupled, self._state = backend, coupled, state
        self._vocab_size, biased = vocab_size, bias_capacity(params) if every_mix else 0
        params = params or ()
        self.draws = every_mix or not all(its.greedy for its in params)
        self._params: list[SamplingParams | None] = [*params, *[SamplingParams()] * (batch - len(params))]
        self.tensors = SamplingTensors.from_params(
            self._params, vocab_size, device, penalties=every_mix, bias_capacity=biased
        )
        self.rng_keys = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.prompt_mask = self.output_counts = None
        if self.tensors.has_penalties:
            self.prompt_mask = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)
            self.output_counts = torch.zeros(batch, vocab_size, dtype=torch.int32, device=device)
        self.processor, self._texts = processor, texts

    @property
    def kind(self) -> tuple:
        """Samplers of equal kinds call the same ops."""
        return self.draws, self.coupled, self.tensors.has_penalties, self.tensors.bias_capacity > 0

    def admit(self, row: int, prompt: Sequence[int], params: SamplingParams, rng_key: Sequence[int]) -> None:
        """A row's tokens are from now on chosen by these parameters, with numbers of this seed and stream."""
        if params != self._params[row]:
            self._params[row] = None  # unknown, should this break off
            self.tensors.set_row(row, params, self._vocab_size)
            self._params[row] = params
        self.rng_keys[row] = torch.tensor(rng_key, dtype=torch.int64, device=self.rng_keys.device)
        if self.prompt_mask is not None:
            self.output_counts[row] = 0
            self.prompt_mask[row] = False
            self.prompt_mask[row, torch.tensor(prompt, dtype=torch.int64, device=self.prompt_mask.device)] = True

    def draft(
        self,
        logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        probs: torch.Tensor | None,
        row_status: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A draft's next token for each row.

        logits: (B, V) float32 of the draft. draft_tokens: (B, k) int64, its tokens of this round so far. probs: (B, V)
        float32 or None, written: what each token was drawn from. row_status: (B) int32 or None, written instead of an
        error. Returns tokens (B) int64.

        Raises:
            ValueError: a row has no token that could be drawn.
        """
        if self.processor is not None:
            logits = logits.clone()
            for row in self._texts.generating():
                tokens = draft_tokens[row].tolist()
                if not self._texts.ends_within(row, tokens):
                    logits[row] = self._process(row, tokens, logits[row])
        positions, counted = self._state.positions, None
        if behind := draft_tokens.shape[1]:
            positions = torch.empty_like(positions)
            torch_op(torch.add, self._state.positions, behind, out=positions)
        if self.output_counts is not None:
            counted = torch.empty(draft_tokens.shape, dtype=torch.int64, device=draft_tokens.device)
            torch_op(torch.Tensor.copy_, counted, draft_tokens)
        try:
            return sample_tokens(
                logits, self.tensors, self.rng_keys, positions, Purpose.TOKEN if self.coupled else Purpose.DRAFT,
                probs=probs, draft_tokens=counted, prompt_mask=self.prompt_mask, output_counts=self.output_counts,
                active=self._state.active, row_status=row_status, backend=self.backend,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"the draft cannot propose a token: {error}") from None

    def accept(
        self,
        logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        draft_probs: torch.Tensor | None,
        num_draft_tokens: torch.Tensor | None,
        is_stop: torch.Tensor,
        row_status: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``speculative_accept`` for the rows that are generating. logits: (B, K+1, V) float32 of the target."""
        if self.processor is not None:
            counts = [0] * len(logits) if num_draft_tokens is None else num_draft_tokens.tolist()
            logits = self._processed(logits, draft_tokens, counts)
        return speculative_accept(
            logits, draft_tokens.contiguous(), draft_probs, self.tensors, self.rng_keys, self._state.positions,
            coupled=self.coupled, prompt_mask=self.prompt_mask, output_counts=self.output_counts,
            active=self._state.active, num_draft_tokens=num_draft_tokens, is_stop=is_stop, row_status=row_status,
            backend=self.backend,
        )  # fmt: skip

    def _processed(self, logits: torch.Tensor, draft_tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
        logits = logits.clone()
        for row in self._texts.generating():
            tokens = draft_tokens[row, : counts[row]].tolist()
            for position in range(len(tokens) + 1):
                if self._texts.ends_within(row, tokens[:position]):
                    logits[row, position] = 0  # harmless, and never drawn from
                    break
                logits[row, position] = self._process(row, tokens[:position], logits[row, position])
                # A token that is impossible now ends the window: the text behind it will never be.
                if position < len(tokens) and logits[row, position, tokens[position]] == -torch.inf:
                    break
        return logits

    def _process(self, row: int, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        processed = self.processor(row, self._texts.rows[row].tokens + tokens, logits.clone())
        if not isinstance(processed, torch.Tensor) or processed.shape != logits.shape:
            what = tuple(processed.shape) if isinstance(processed, torch.Tensor) else type(processed).__name__
            raise ValueError(f"logits_processor must return logits of shape {tuple(logits.shape)}, got {what}")
        return processed


def bias_capacity(params: Sequence[SamplingParams] | None) -> int:
    """Biased tokens of a row that there is memory for, so that few captured rounds serve all calls: a power of two.
    None: any parameters may come."""
    if params is None:
        return MAX_BIASED
    longest = max((len(its.logit_bias) for its in params), default=1)
    return max(_MIN_BIAS_CAPACITY, 1 << (longest - 1).bit_length())


def mix_of(params: Sequence[SamplingParams]) -> tuple:
    """Samplers that were made for parameters of one mix have the same memory."""
    biased = max((len(its.logit_bias) for its in params), default=0)
    return all(its.greedy for its in params), any(its.penalised for its in params), biased
