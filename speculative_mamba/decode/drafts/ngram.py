"""Prompt lookup: the text so far is the draft (Saxena 2023; Yang et al. 2023, arXiv 2304.04487)."""

import copy

import torch

from ...models.runner import RowState
from ...ops.commit_tokens import BatchState
from ...ops.values import is_int
from ..sampling import Sampler
from .base import Draft, Proposal
from .python import PythonDraft


class NgramDrafter:
    """Proposes what followed the last tokens of a text when they occurred in it before, prompt included.

    Per row, the longest suffix of ``longest`` down to ``shortest`` tokens that also ends earlier is looked up, and of
    several earlier places the most recent is copied on from. A copy that arrives at the end of the text goes on through
    its own tokens, which continues a period; so a match always gives ``lookahead`` tokens. They are certain, not drawn:
    every way to accept stays exact.

    Where no row has a match nothing is proposed, and the round is a step of plain decoding. In a batch a row without
    one repeats its last token beside the rows that have one, since the window is a rectangle; ``counts`` says that none
    of them counts. A row that has not grown since the last proposal has ended and is not looked up; nor is one of which
    a shorter text is being read.

    Each token is read once and takes time and memory O(longest), however long the text is.

    longest, shortest: single tokens match nearly everywhere and are mostly wrong, and a wrong proposal costs a wider
    pass; pairs are the shortest that gain on source code and lose nothing on prose. More than four tokens hardly ever
    find a better place.

    Raises:
        ValueError: not 1 <= shortest <= longest, in whole numbers.
    """

    def __init__(self, vocab_size: int, *, longest: int = 4, shortest: int = 2) -> None:
        if not (is_int(shortest) and is_int(longest) and 1 <= shortest <= longest):
            raise ValueError(
                "shortest and longest must be whole numbers with 1 <= shortest <= longest, "
                f"got {shortest!r} and {longest!r}"
            )
        self.vocab_size = vocab_size
        self.longest, self.shortest = longest, shortest
        self.counts: list[int] = []  # how many tokens of each row's last proposal count
        self._indices: list[_Index] = []
        self._asked: list[int] = []  # each row's length when a proposal was last asked for

    def begin(self, prompts: list[list[int]], lookahead: int, sampler: Sampler) -> None:
        self._indices = [_Index(self.longest) for _ in prompts]
        self._asked = [0] * len(prompts)
        for row, prompt in enumerate(prompts):
            self.restart(row, prompt)

    def restart(self, row: int, prompt: list[int]) -> None:
        """Another text in one row of the batch."""
        self._indices[row], self._asked[row] = _Index(self.longest), 0
        self._indices[row].extend(prompt)

    def propose(self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int) -> tuple[torch.Tensor, None]:
        places = []
        for row, (index, text) in enumerate(zip(self._indices, rows, strict=True)):
            index.extend(text[index.length :])
            places.append(index.find(self.shortest) if index.length == len(text) > self._asked[row] else None)
            self._asked[row] = len(text)
        if all(place is None for place in places):
            lookahead = 0
        self.counts = [0 if place is None else lookahead for place in places]
        copied = []
        for text, place in zip(rows, places, strict=True):
            period = 1 if place is None else len(text) - place
            copied.append([text[step % period - period] for step in range(lookahead)])
        return torch.tensor(copied, dtype=torch.int64, device="cpu"), None


class _Index:
    """Where each n-gram of a growing text, up to ``longest`` tokens, was last followed by a token.

    A trie: node 0 is the empty n-gram, and the child of a node by a token is its n-gram with that token appended.
    """

    def __init__(self, longest: int) -> None:
        self.length = 0
        self._longest = longest
        self._children: dict[tuple[int, int], int] = {}
        self._next_position = [0]  # per node, the position of the token after its last occurrence; 0: there was none
        self._suffixes = [0]  # the nodes of the text's last 0, 1, … tokens

    def extend(self, tokens: list[int]) -> None:
        """Appends to the text."""
        for token in tokens:
            grown = [0]
            for node in self._suffixes:
                # What the text ended with is now followed by this token, and can be found.
                self._next_position[node] = self.length
                if len(grown) <= self._longest:
                    child = self._children.setdefault((node, token), len(self._next_position))
                    if child == len(self._next_position):
                        self._next_position.append(0)
                    grown.append(child)
            self._suffixes = grown
            self.length += 1

    def find(self, shortest: int) -> int | None:
        """The position after the last earlier occurrence of the longest suffix that has one."""
        for node in reversed(self._suffixes[shortest:]):
            if self._next_position[node]:
                return self._next_position[node]
        return None


class NgramLookup(PythonDraft):
    """``NgramDrafter`` in rounds that the host follows; a row that comes costs the others nothing."""

    def allocate(self, batch: int, lookahead: int, sampler: Sampler, *, captured: bool) -> "NgramLookup":
        self.drafter.begin([[0]] * batch, lookahead, sampler)
        return self

    def prefill(self, row: int, text: list[int], state: RowState | None = None) -> None:
        self.drafter.restart(row, text)

    def ready(self) -> None: ...

    def rows(self) -> list[list[int]]:
        return self._texts()  # it only reads, and not all of a text

    def propose(self, state: BatchState, lookahead: int) -> Proposal:
        proposal = super().propose(state, lookahead)
        proposal.num_tokens = torch.tensor(self.drafter.counts, dtype=torch.int32, device=state.last.device)
        return proposal


class NgramSearch(Draft):
    """``NgramDrafter`` on the device: the same proposals, found by a search of the whole text."""

    capturable = True

    def __init__(self, drafter: NgramDrafter, device: torch.device) -> None:
        self.vocab_size, self._longest, self._shortest = drafter.vocab_size, drafter.longest, drafter.shortest
        self._device = device

    def identity(self) -> tuple:
        return NgramSearch, self._longest, self._shortest

    def allocate(self, batch: int, lookahead: int, sampler: Sampler, *, captured: bool) -> "NgramSearch":
        allocated = copy.copy(self)
        allocated._lengthen(torch.zeros(batch, 0, dtype=torch.int64, device=self._device))
        return allocated

    def prefill(self, row: int, text: list[int], state: RowState | None = None) -> None:
        self.text[row, : len(text)] = torch.tensor(text, dtype=torch.int64, device=self._device)

    def propose(self, state: BatchState, lookahead: int) -> Proposal:
        """Rows without a match repeat their last token, of which none counts."""
        length = state.positions[:, None].clamp(min=1)  # 0 before a row's first text
        same, matched = self._at < length, torch.zeros_like(self.text)
        for back in range(1, self._longest + 1):  # how many tokens before a place equal the text's last ones
            last = self.text.gather(1, (length - back).clamp(min=0))
            same = same & (self.text.roll(back, 1) == last) & (self._at >= back)
            matched += same
        # The longest match, and of those the latest place.
        found = torch.where(matched >= self._shortest, matched * len(self._at) + self._at, -1).amax(1, keepdim=True)
        place = torch.where(found < 0, length - 1, found % len(self._at))
        step = torch.arange(lookahead, dtype=torch.int64, device=place.device)
        tokens = self.text.gather(1, place + step % (length - place))
        return Proposal(tokens, num_tokens=torch.where(found[:, 0] < 0, 0, lookahead).int())

    def reserve(self, entries: int) -> bool:
        missing = entries - self.text.shape[1]
        if missing <= 0:
            return False
        self._lengthen(torch.nn.functional.pad(self.text, (0, missing + entries)))
        return True

    def tensors(self) -> list[torch.Tensor]:
        return [self.text]

    def _lengthen(self, text: torch.Tensor) -> None:
        self.text, self._at = text, torch.arange(text.shape[1], dtype=torch.int64, device=self._device)
