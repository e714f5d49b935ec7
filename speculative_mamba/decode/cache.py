"""Where a batch of texts has got to, for generating on from there."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..models.identity import KnownModel
from ..models.runner import RowState


@dataclass
class GenerationCache:
    """A batch's texts and the models' states after them: pass one to ``generate``, then pass it again to go on.

    sequences: each row's committed tokens, prompt included, when the last call ended; also after Ctrl-C, and after an
    error in a callback. The states are copies, one per row, so a cache may be used with any lookahead and ``copy()`` is
    cheap: continuing one copy leaves the other as it was. A call that breaks off while a model runs leaves the state
    from before it; then the next call computes the difference again. A state knows the tokens that it has read: a text
    that was changed or cut within them is refused.

    Models are known by their weights and not kept alive, so a cache can be pickled and used where they are loaded. A
    stateful draft without a model is known by its class, its vocabulary size and the tensors among its attributes.

    Costs, per row, one state per layer of target and draft, and one copy of it per call.
    """

    sequences: list[list[int]] = field(default_factory=list)
    target_states: list[RowState | None] = field(default_factory=list, repr=False)
    draft_states: list[RowState | None] = field(default_factory=list, repr=False)
    _target: KnownModel | None = field(default=None, repr=False)
    _draft: KnownModel | None = field(default=None, repr=False)

    @property
    def target(self) -> object:
        """The model of ``target_states``, while somebody else holds it."""
        return self._target and self._target.model()

    @property
    def draft(self) -> object:
        """The model of ``draft_states``, or the draft that made them without one, while somebody else holds it."""
        return self._draft and self._draft.model()

    def copy(self) -> "GenerationCache":
        """An independent cache at the same texts."""
        sequences = [list(text) for text in self.sequences]
        states = list(self.target_states), list(self.draft_states)
        return GenerationCache(sequences, *states, self._target, self._draft)

    def store(
        self, sequences: list[list[int]], target_states: list[RowState | None], draft_states: list[RowState | None]
    ) -> None:
        """Texts, and states of them. Texts come first: a state beyond its text would be refused."""
        self.sequences = sequences
        self.target_states = target_states
        self.draft_states = draft_states

    def open(self, prompts: Sequence[list[int]], target: object, draft: object) -> None:
        """Takes over a batch of prompts, each of which must begin with its row's text.

        draft: the model whose states are kept, or a draft without one; None keeps those of the last.

        Raises:
            ValueError: the cache belongs to another model, another number of rows or another text.
        """
        known = KnownModel.of(target, self._target)
        if self._target is None:
            self.target_states = [None] * len(prompts)
        elif known != self._target:
            raise ValueError("the cache belongs to another model; use one cache per target model")
        self._check_texts(prompts)
        if draft is not None:
            drafted = KnownModel.of(draft, self._draft)
            if drafted != self._draft:
                self.draft_states = []
            self._draft = drafted
        if len(self.draft_states) != len(prompts):
            self.draft_states = [None] * len(prompts)
        states = zip(self.draft_states, prompts, strict=True)
        # The draft's own window begins with the last two tokens.
        self.draft_states = [s if s and prompt[:-2][: len(s.tokens)] == s.tokens else None for s, prompt in states]
        self._target, self.sequences = known, [list(prompt) for prompt in prompts]

    def _check_texts(self, prompts: Sequence[list[int]]) -> None:
        if len(self.target_states) != len(prompts):
            count = len(self.target_states)
            raise ValueError(f"the cache holds {count} rows, but there are {len(prompts)} prompts")
        for row, (prompt, state) in enumerate(zip(prompts, self.target_states, strict=True)):
            for text in (*self.sequences[row : row + 1], [] if state is None else state.tokens):
                if prompt[: len(text)] != text:
                    raise ValueError(f"the prompt of row {row} does not begin with its cache's {len(text)} tokens")
            if state is not None and len(state.tokens) >= len(prompt):
                raise ValueError(f"the prompt of row {row} is no longer than the tokens that its cache has read")
