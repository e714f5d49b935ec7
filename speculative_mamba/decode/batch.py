"""The rows of a batch."""

import copy
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..models.runner import RowState
from ..models.text import TextStream
from ..ops.commit_tokens import FinishReason, Record
from ..ops.sampling import ROW_STATUS_TEXTS
from .round import Round, RoundResult
from .sampling import SamplingParams
from .stats import GenerationStats


class CommittedToken(NamedTuple):
    """A token that became text of a row. drafted: it came from the draft, and the target accepted it."""

    row: int
    token: int
    drafted: bool


class RowTokens(NamedTuple):
    """What became text of a row in a round. drafted: the first so many came from the draft."""

    row: int
    tokens: list[int]
    drafted: int


@dataclass
class Row:
    """A text in the making.

    max_length: tokens of the complete text. stop_token_ids: each ends it. stream: finds stop strings; its pieces, one
    for each new token, go to ``pieces``. use_draft: whether tokens are drafted for it. output_logits: the target's, (n,
    V) for the n tokens of a round, go to ``logits``. first_round: rounds before this one knew nothing of it.
    finish_reason: "eos", "length", "stop", or as ``retire`` says; "error", and the error beside it. slot: the target's,
    from which the text goes on; None where it was written over, or not all is booked. draft_at: the draft's slot, and
    the length of the text, when the draft was last asked. tested, accepted: drafted tokens, as in ``GenerationStats``.
    """

    tokens: list[int]
    max_length: int
    stop_token_ids: frozenset[int] = frozenset()
    stream: TextStream | None = None
    use_draft: bool = True
    output_logits: bool = False
    first_round: int = 0
    pieces: list[str] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    finish_reason: str | None = None
    error: ValueError | None = None
    slot: int | None = None
    draft_at: tuple[int, int] | None = None
    tested: int = 0
    accepted: int = 0

    @property
    def remaining(self) -> int:
        return self.max_length - len(self.tokens)


class Batch:
    """The one owner of texts, budgets, stop rules, sampling parameters and slots of all rows.

    ``round`` is its twin on the device, which a round works on: ``round.state``, stop tokens and the sampler's tensors.
    Rows come (``admit``) and go (``retire``) between rounds, also while rounds are queued that know nothing of it; a
    row's text does not depend on when. The host believes the record of a round: what was committed, and with what
    status. Stop strings alone are the host's.

    isolate_errors: a row that is broken ends, with its error; else all end with it. reading: rows whose prompts are
    being read, in the order of their turns, and what reads on.
    """

    def __init__(self, size: int, *, isolate_errors: bool = False) -> None:
        self.rows: list[Row | None] = [None] * size
        self.reading: dict[int, Iterator[int]] = {}
        self.round: Round | None = None
        self._isolate_errors = isolate_errors
        self._launched = self._committed = 0  # rounds

    def texts(self) -> list[list[int]]:
        """The committed tokens of all rows; that of a row that never was is a single token."""
        return [[0] if row is None else row.tokens for row in self.rows]

    def generating(self) -> list[int]:
        """Rows whose prompt is read and whose text is not complete."""
        rows = enumerate(self.rows)
        return [i for i, row in rows if row is not None and row.finish_reason is None and i not in self.reading]

    def admit(
        self,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        max_new_tokens: int,
        *,
        rng_key: Sequence[int] | None = None,
        states: tuple[RowState | None, RowState | None] = (None, None),
        stop_token_ids: Collection[int] = (),
        stream: TextStream | None = None,
        use_draft: bool = True,
        output_logits: bool = False,
        chunk: int | None = None,
    ) -> None:
        """A new text in a row that has none or whose text is complete. It gets at least one token.

        rng_key: seed and stream, by default (``params.seed``, 0). states: target's and draft's, of the prompt's first
        tokens. stop_token_ids, stream, use_draft, output_logits: see ``Row``. chunk: ``read`` reads the prompt, so many
        tokens at a time, and then the row takes part in rounds; None: at once.

        Raises:
            ValueError: the row is still generating, or there is nothing to generate.
        """
        before = self.rows[index]
        if (before is not None and before.finish_reason is None) or max_new_tokens < 1:
            raise ValueError(f"row {index} is still generating, or has no token to generate ({max_new_tokens})")
        row = self.rows[index] = Row(
            list(prompt), len(prompt) + max_new_tokens, frozenset(stop_token_ids), stream, use_draft, output_logits
        )
        rng_key = (params.seed, 0) if rng_key is None else rng_key
        self.reading[index] = self._read(index, row, params, rng_key, states, chunk)
        while chunk is None and index in self.reading:
            self.read(index)

    def read(self, index: int) -> int:
        """Reads the next part of a row's prompt; how many tokens it had. Behind the last the row is generating.

        Raises:
            ValueError: the row cannot be read, unless errors are isolated.
        """
        try:
            count = next(self.reading[index], None)
        except ValueError as error:
            if not self._isolate_errors:
                raise
            self.retire(index, "error")
            self.rows[index].error = error
            return 0
        if count is None:
            del self.reading[index]
        return count or 0

    def _read(
        self,
        index: int,
        row: Row,
        params: SamplingParams,
        rng_key: Sequence[int],
        states: tuple[RowState | None, RowState | None],
        chunk: int | None,
    ) -> Iterator[int]:
        """Brings target and draft to the end of a prompt, and lets the row take part in rounds from then on."""
        prompt, round, (target_state, draft_state) = row.tokens, self.round, states
        draft = round.draft if row.use_draft else None
        round.target.reset(index, target_state)
        parts = _cuts(target_state, len(prompt) - 1, chunk)
        drafted = [] if draft is None else _cuts(draft_state, len(prompt), chunk if draft.stateful else None)
        for (start, end), (draft_start, draft_end) in itertools.zip_longest(parts, drafted, fillvalue=(0, 0)):
            round.target.read(index, prompt[start:end])
            if draft_end:
                draft.prefill(index, prompt[:draft_end], draft_state)
                draft_state = draft.snapshot(index, 0, prompt[:draft_end]) if draft_end < len(prompt) else None
            yield max(end - start, draft_end - draft_start)
        if draft is not None:
            row.draft_at = 0, len(prompt)
        elif round.draft is not None:
            round.draft.prefill(index, prompt[-1:])  # what it drafts counts for nothing, but it must not outgrow memory
        round.sampler.admit(index, prompt, params, rng_key)
        round.admit(index, prompt, row.remaining, row.stop_token_ids, row.use_draft)
        row.slot, row.first_round = 0, self._launched

    def retire(self, index: int, reason: str = "stop") -> None:
        """A row's text is complete, as the host alone knows."""
        row = self.rows[index]
        if self.reading.pop(index, None) is None and self._queued(row):
            row.slot = row.draft_at = None  # rounds that are queued go on with it
        row.finish_reason = reason
        self.round.state.leave_out(index)

    def launching(self) -> None:
        """A round is about to be queued."""
        self._launched += 1

    def _queued(self, row: Row) -> int:
        """Rounds that know of a row and are queued, or were when all broke off: its slots may hold another state."""
        return max(0, self._launched - max(self._committed, row.first_round))

    def commit(self, result: RoundResult, record: list[list[int]], stats: GenerationStats) -> list[RowTokens]:
        """Appends to each row what it gained in the oldest queued round, up to a stop. All of that, by row.

        Raises:
            ValueError: a row is broken, unless errors are isolated.
        """
        taking_part = [index for index in self.generating() if self.rows[index].first_round <= self._committed]
        errors = {index: error for index in taking_part if (error := self._error(index, record[index])) is not None}
        if errors and not self._isolate_errors:
            raise next(iter(errors.values()))
        fresh = []
        for index in taking_part:
            row, columns = self.rows[index], record[index]
            if index in errors:
                row.error, row.finish_reason, row.slot, row.draft_at = errors[index], "error", None, None
                continue
            tokens = self._commit_row(index, columns, result)
            accepted = columns[Record.ACCEPTED]
            tested, stood = stats.count(columns[Record.NUM_DRAFT_TOKENS], accepted, len(tokens))
            row.tested += tested
            row.accepted += stood
            fresh.append(RowTokens(index, tokens, min(accepted, len(tokens))))
        self._committed += 1
        return fresh

    def _error(self, index: int, record: list[int]) -> ValueError | None:
        """What is wrong with a broken row, unless its text ends before."""
        status, draft_status = record[Record.ROW_STATUS], record[Record.DRAFT_STATUS]
        if not (status or draft_status):
            return None
        accepted = record[Record.ACCEPTED]
        if self.ends_within(index, record[Record.TOKENS : Record.TOKENS + accepted]):
            record[Record.NUM_COMMITTED] = accepted  # up to a stop string, of which the device does not know
            return None
        if draft_status:
            return ValueError(f"the draft cannot propose a token: row {index}: {ROW_STATUS_TEXTS[draft_status]}")
        return ValueError(f"row {index}, position {accepted} of the window: {ROW_STATUS_TEXTS[status]}")

    def _commit_row(self, index: int, record: list[int], result: RoundResult) -> list[int]:
        row, count, reason = self.rows[index], record[Record.NUM_COMMITTED], record[Record.FINISH_REASON]
        assert count, f"row {index} has ended on the device alone"
        tokens = record[Record.TOKENS : Record.TOKENS + count]
        row.slot = None  # until all is booked
        pieces = []
        if row.stream is not None:
            pieces = _push(row.stream, tokens[: count - (reason == FinishReason.EOS)])  # a stop token is no text
        stopped = row.stream is not None and row.stream.stopped
        if stopped:
            del tokens[len(pieces) :]
        row.tokens += tokens
        if row.output_logits:
            row.logits.append(result.logits[index, : len(tokens)].clone())
        if result.lookahead and row.use_draft:
            row.draft_at = len(tokens) - 1, len(row.tokens)
        if stopped:
            row.finish_reason = "stop"
            self.round.state.leave_out(index)
        elif reason:
            row.finish_reason = FinishReason(reason).name.lower()
        if not stopped or self._queued(row) == 1:  # this one
            row.slot = len(tokens) - 1
        if row.stream is not None:
            pieces += [""] * (len(tokens) - len(pieces))
            pieces[-1] += row.stream.finish() if row.finish_reason else ""
            row.pieces += pieces
        return tokens

    def ends_within(self, index: int, tokens: Sequence[int]) -> bool:
        """Whether a row's text is complete with some of these tokens behind it."""
        row = self.rows[index]
        if len(tokens) >= row.remaining or not row.stop_token_ids.isdisjoint(tokens):
            return True
        if row.stream is None or not tokens:
            return False
        ahead = copy.deepcopy(row.stream, {id(row.stream.tokenizer): row.stream.tokenizer})
        _push(ahead, tokens)
        return ahead.stopped

    def snapshot(self, index: int) -> tuple[RowState | None, RowState | None]:
        """The states of target and draft in a row's slots; None where those hold another text's, or are not kept."""
        row, draft = self.rows[index], self.round.draft
        if row.slot is None or (self._queued(row) and row.finish_reason is None):
            return None, None
        target_state, draft_state = self.round.target.snapshot(index, row.slot, row.tokens[:-1]), None
        if draft is not None and draft.stateful and row.draft_at is not None:
            slot, length = row.draft_at
            draft_state = draft.snapshot(index, slot, row.tokens[:length])
        return target_state, draft_state


def _push(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    """The text that each token completes, up to and with that which completes a stop string."""
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return pieces


def _cuts(state: RowState | None, end: int, chunk: int | None) -> list[tuple[int, int]]:
    """Where the parts of a prompt begin and end that are read at a time behind what ``state`` has read."""
    start = 0 if state is None else len(state.tokens)
    ends = [end] if chunk is None else [*range(start + chunk, end, chunk), end]
    return list(zip([start, *ends], ends, strict=False))
