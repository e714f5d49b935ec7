"""Where a batch of texts has got to, for generating on from there."""

from dataclasses import dataclass, field

import torch

# One layer's recurrent state after some token, and the convolution's inputs before the next (see ``MambaCache``).
LayerState = tuple[torch.Tensor, torch.Tensor]


@dataclass
class RowState:
    """What a model has in mind after the first ``absorbed`` tokens of a row's text."""

    absorbed: int
    layers: list[LayerState]

    @staticmethod
    def of(cache: list, row: int, slot: int, absorbed: int) -> "RowState":
        """A copy of the state in a row's slot."""
        return RowState(absorbed, [layer.checkpoint(row, slot) for layer in cache])


def absorb(model: object, cache: list, row: int, tokens: list[int], state: RowState | None) -> None:
    """Brings slot 0 of a row to the state after ``tokens``, going on from ``state`` if there is one."""
    done = 0
    if state is not None:
        done = state.absorbed
        for layer, saved in zip(cache, state.layers, strict=True):
            layer.restore(row, saved)
    model.prefill(tokens[done:], cache, row)


@dataclass
class GenerationCache:
    """A batch's texts and the models' states after them: pass one to ``generate``, then pass it again to go on.

    sequences: each row's committed tokens, prompt included; also after Ctrl-C, and after an error in a callback. The
    states are copies, one per row, so a cache may be used with any lookahead and ``copy()`` is cheap: continuing one
    copy leaves the other as it was. A call that breaks off while a model runs leaves the state from before it; then
    the next call computes the difference again.

    Costs, per row, one state per layer of target and draft, and one copy of it per call.
    """

    sequences: list[list[int]] = field(default_factory=list)
    target: object = None
    draft: object = None
    target_states: list[RowState | None] = field(default_factory=list, repr=False)
    draft_states: list[RowState | None] = field(default_factory=list, repr=False)

    def copy(self) -> "GenerationCache":
        """An independent cache at the same texts."""
        return GenerationCache(
            [list(tokens) for tokens in self.sequences], self.target, self.draft, list(self.target_states),
            list(self.draft_states),
        )  # fmt: skip

    def open(self, prompts: list[list[int]], target: object, draft: object) -> None:
        """Takes over a batch of prompts, each of which must begin with its row's text; the lists may grow.

        Raises:
            ValueError: the cache belongs to another model, another number of rows or another text.
        """
        if self.target is not None:
            if self.target is not target:
                raise ValueError("the cache belongs to another model; use one cache per target model")
            if len(self.sequences) != len(prompts):
                raise ValueError(f"the cache holds {len(self.sequences)} rows, but there are {len(prompts)} prompts")
            for row, (text, prompt) in enumerate(zip(self.sequences, prompts, strict=True)):
                if prompt[: len(text)] != text:
                    raise ValueError(f"the prompt of row {row} does not begin with the {len(text)} tokens of its cache")
        else:
            self.target_states = [None] * len(prompts)
        if len(self.draft_states) != len(prompts) or (draft is not None and draft is not self.draft):
            self.draft, self.draft_states = draft, [None] * len(prompts)
        self.target, self.sequences = target, prompts
