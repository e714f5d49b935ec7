"""Who proposes tokens."""

from typing import Protocol

import torch

from ..models.language_model import MambaLM
from .sampling import SamplingParams, draw, filtered_probabilities, greedy_tokens


class LanguageModel(Protocol):
    """What the loop asks of a model; ``MambaLM`` documents each."""

    vocab_size: int
    eos_token_id: int | None
    device: torch.device

    def new_cache(self, batch: int, slots: int) -> list: ...
    def prefill(self, tokens: list[int], cache: list, row: int) -> None: ...
    def verify(
        self,
        tokens: torch.Tensor,
        cache: list,
        start_slot: torch.Tensor,
        write_slot: int = 0,
        null_columns: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor: ...


class Drafter(Protocol):
    """Proposes tokens for every row of a batch. Any class with these methods and ``vocab_size`` is a draft."""

    vocab_size: int

    def begin(
        self, prompts: list[list[int]], lookahead: int, sampling: SamplingParams, generators: list[torch.Generator]
    ) -> None:
        """A new batch: rows of token ids, and at most ``lookahead`` tokens a round."""

    def propose(
        self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafts ``lookahead`` tokens after each row's committed text.

        rows: all committed tokens. accepted: (B) int32, how many tokens of the last round's draft were accepted
        (0 at first). Returns tokens (B, K) int64, and the laws (B, K, V) float32 they were drawn from; None when
        they were not drawn at random (then the loop takes each as certain).
        """


class ModelDrafter:
    """A smaller model as the draft, with one cache slot per position like the target's.

    A round's first step takes the last *two* committed tokens, so the draft never lacks one, even after all its tokens
    were accepted; then slot j holds the state before the j-th drafted token's successor, as the target's does.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.vocab_size = model.vocab_size

    def begin(
        self, prompts: list[list[int]], lookahead: int, sampling: SamplingParams, generators: list[torch.Generator]
    ) -> None:
        self._sampling, self._generators = sampling, generators
        self._cache = self.model.new_cache(len(prompts), lookahead + 1)
        # A one-token prompt has no token before its last: a null column stands for it, in the first round.
        self._null_columns = torch.tensor(
            [int(len(prompt) < 2) for prompt in prompts], dtype=torch.int32, device=self.model.device
        )
        for row, prompt in enumerate(prompts):
            self.model.prefill(prompt[:-2], self._cache, row)

    def propose(
        self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        device = self.model.device
        last_two = torch.tensor([[row[-2] if len(row) > 1 else 0, row[-1]] for row in rows], device=device)
        null_columns = self._null_columns
        self._null_columns = None
        logits = self.model.verify(last_two, self._cache, accepted, 0, null_columns, last_only=True)[:, -1]
        tokens, laws = [], []
        for step in range(lookahead):
            if step:
                start = torch.full((len(rows),), step, dtype=torch.int32, device=device)
                logits = self.model.verify(tokens[-1][:, None], self._cache, start, step + 1)[:, -1]
            tokens.append(self._choose(logits, laws))
        return torch.stack(tokens, 1), torch.stack(laws, 1) if laws else None

    def _choose(self, logits: torch.Tensor, laws: list[torch.Tensor]) -> torch.Tensor:
        if self._sampling.greedy:
            return greedy_tokens(logits)
        law = filtered_probabilities(logits, self._sampling)
        laws.append(law)
        tokens = []
        for row, generator in enumerate(self._generators):
            try:
                tokens.append(draw(law[row], generator))
            except ValueError as error:
                raise ValueError(f"the draft cannot propose a token for row {row}: {error}") from None
        return torch.tensor(tokens, device=logits.device)


def as_drafter(draft: "Drafter | MambaLM | LanguageModel") -> Drafter:
    """A draft model becomes a drafter; anything that proposes already is one."""
    return draft if hasattr(draft, "propose") else ModelDrafter(draft)
