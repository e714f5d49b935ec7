"""Where a batch of texts has got to, for generating on from there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..models.identity import KnownModel
from ..models.runner import RowState
from ..ops.values import is_int, shown
from . import cache_file

_Pair = tuple[RowState, RowState | None]  # the target's and the draft's


class CacheParts(NamedTuple):
    """target, draft: what models are known by. kept: earlier states of each row, the newest last."""

    target: str | None
    draft: str | None
    kept: list[list[_Pair]]


@dataclass
class GenerationCache:
    """A batch's texts and the models' states after them: pass one to ``generate``, then pass it again to go on.

    sequences: each row's committed tokens, prompt included, when the last call ended; also after Ctrl-C, and after an
    error in a callback. The states are copies, one per row, so a cache may be used with any lookahead and ``copy()`` is
    cheap: continuing one copy leaves the other as it was. A call that breaks off while a model runs leaves the state
    from before it; then the next call computes the difference again. A state knows the tokens that it has read: a text
    that was changed or cut within them is refused.

    keep: earlier states of each row that are kept, the newest so many: those after each call's prompt and after its
    text. A prompt that does not begin with the row's text then goes on from the longest of them that it begins with, as
    when an answer is to be made anew or the last turn of a chat was edited.

    Models are known by their weights and not kept alive, so a cache can be pickled and used where they are loaded. A
    stateful draft without a model is known by its class, its vocabulary size and the tensors among its attributes.

    Costs, per row, one state per layer of target and draft, and one copy of it per call; with ``keep`` two copies, and
    so many states more. Keys and values of attention layers are in each.
    """

    sequences: list[list[int]] = field(default_factory=list)
    target_states: list[RowState | None] = field(default_factory=list, repr=False)
    draft_states: list[RowState | None] = field(default_factory=list, repr=False)
    _target: KnownModel | None = field(default=None, repr=False)
    _draft: KnownModel | None = field(default=None, repr=False)
    keep: int = 0
    _kept: list[list[_Pair]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not is_int(self.keep) or self.keep < 0:
            raise ValueError(f"keep must be a whole number of at least 0, got {shown(self.keep)}")

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
        kept = [list(pairs) for pairs in self._kept]
        return GenerationCache(sequences, *states, self._target, self._draft, self.keep, kept)

    def save(self, path: str | Path) -> None:
        """Writes it to one file, of safetensors.

        Raises:
            ValueError: the file cannot be written.
        """
        cache_file.write(self, path)

    @staticmethod
    def load(path: str | Path) -> "GenerationCache":
        """What ``save`` wrote, for the same models, wherever they are loaded.

        Raises:
            ValueError: the file cannot be read, is something else, or is damaged.
        """
        description, texts, states = cache_file.read(path)
        target_states, draft_states, kept = (
            _numbered(description[name], states) for name in ("target_states", "draft_states", "kept")
        )
        kept = [[tuple(pair) for pair in row] for row in kept]
        models = (known and KnownModel.recalled(known) for known in (description["target"], description["draft"]))
        return GenerationCache(texts, target_states, draft_states, *models, description["keep"], kept)

    def parts(self) -> CacheParts:
        """What else belongs into a file."""
        return CacheParts(*(known and known.fingerprint for known in (self._target, self._draft)), self._kept)

    def store(
        self, sequences: list[list[int]], target_states: list[RowState | None], draft_states: list[RowState | None]
    ) -> None:
        """Texts, and states of them. Texts come first: a state beyond its text would be refused."""
        self.sequences = sequences
        self.target_states = target_states
        self.draft_states = draft_states
        for row, pair in enumerate(zip(target_states, draft_states, strict=True)):
            self.remember(row, *pair)

    def remember(self, row: int, target_state: RowState | None, draft_state: RowState | None) -> None:
        """Keeps states of a row, if any are to be kept; the oldest go."""
        if self.keep and target_state is not None and target_state.tokens:
            others = [pair for pair in self._kept[row] if pair[0].tokens != target_state.tokens]
            self._kept[row] = [*others, (target_state, draft_state)][-self.keep :]

    def open(self, prompts: Sequence[list[int]], target: object, draft: object) -> None:
        """Takes over a batch of prompts, each of which must begin with its row's text, or with one that was kept.

        draft: the model whose states are kept, or a draft without one; None keeps those of the last.

        Raises:
            ValueError: the cache belongs to another model, another number of rows or another text.
        """
        known = KnownModel.of(target, self._target)
        if self._target is not None and known != self._target:
            raise ValueError("the cache belongs to another model; use one cache per target model")
        states = self._states_for(prompts)
        if draft is not None:
            drafted = KnownModel.of(draft, self._draft)
            if drafted != self._draft:
                states = [(target_state, None) for target_state, _ in states]
                self._kept = [[(target_state, None) for target_state, _ in pairs] for pairs in self._kept]
            self._draft = drafted
        self.target_states = [target_state for target_state, _ in states]
        # The draft's own window begins with the last two tokens.
        self.draft_states = [
            state if state is not None and prompt[:-2][: len(state.tokens)] == state.tokens else None
            for (_, state), prompt in zip(states, prompts, strict=True)
        ]
        self._kept = self._kept or [[] for _ in prompts]
        self._target, self.sequences = known, [list(prompt) for prompt in prompts]

    def _states_for(self, prompts: Sequence[list[int]]) -> list[tuple[RowState | None, RowState | None]]:
        """The target's and the draft's, for each prompt."""
        if self._target is None:
            return [(None, None)] * len(prompts)
        if len(self.target_states) != len(prompts):
            count = len(self.target_states)
            raise ValueError(f"the cache holds {count} rows, but there are {len(prompts)} prompts")
        drafts = self.draft_states if len(self.draft_states) == len(prompts) else [None] * len(prompts)
        newest = zip(self.target_states, drafts, strict=True)
        return [
            self._state_for(row, prompt, pair) for row, (prompt, pair) in enumerate(zip(prompts, newest, strict=True))
        ]

    def _state_for(
        self, row: int, prompt: list[int], newest: tuple[RowState | None, RowState | None]
    ) -> tuple[RowState | None, RowState | None]:
        read = [] if newest[0] is None else newest[0].tokens
        texts = [*self.sequences[row : row + 1], read]
        left = next((text for text in texts if prompt[: len(text)] != text), None)
        if left is None and len(read) < len(prompt):
            return newest
        kept = self._kept[row] if self._kept else []
        fitting = [pair for pair in kept if len(pair[0].tokens) < len(prompt) and _begins(prompt, pair[0].tokens)]
        if fitting:
            return max(fitting, key=lambda pair: len(pair[0].tokens))
        if left is not None:
            raise ValueError(f"the prompt of row {row} does not begin with its cache's {len(left)} tokens")
        raise ValueError(f"the prompt of row {row} is no longer than the tokens that its cache has read")


def _begins(prompt: list[int], tokens: list[int]) -> bool:
    return prompt[: len(tokens)] == tokens


def _numbered(numbers: object, states: list[RowState]) -> object:
    """Numbers within lists, and the states that they stand for."""
    if isinstance(numbers, list):
        return [_numbered(number, states) for number in numbers]
    return None if numbers is None else states[numbers]
