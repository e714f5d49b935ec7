"""The rows of a batch."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

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


@dataclass
class Row:
    """A text in the making.

    max_length: tokens of the complete text. first_round: rounds before this one knew nothing of it. slot: the target's,
    from which the text goes on; None where it was written over, or not all is booked. draft_at: the draft's slot, and
    the length of the text, when the draft was last asked.
    """

    tokens: list[int]
    max_length: int
    first_round: int
    stream: TextStream | None = None
    logits: list[torch.Tensor] = field(default_factory=list)
    finish_reason: str | None = None
    slot: int | None = None
    draft_at: tuple[int, int] | None = None

    @property
    def remaining(self) -> int:
        return self.max_length - len(self.tokens)


class Batch:
    """The one owner of texts, budgets, stop rules, sampling parameters and slots of all rows.

    ``bind`` gives it its twin on the device, which a round works on: ``round.state`` and the sampler's tensors. Rows
    come (``admit``) and go (``retire``) between rounds, also while rounds are queued that know nothing of it; a row's
    text does not depend on when. The host believes the record of a round: what was committed, and with what status.
    Stop strings alone are the host's.
    """

    def __init__(
        self,
        size: int,
        stop_token_ids: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        output_logits: bool = False,
    ) -> None:
        self.rows: list[Row | None] = [None] * size
        self.stop_token_ids = frozenset(stop_token_ids)
        self.output_logits = output_logits
        self._stop_strings, self._tokenizer = tuple(stop_strings), tokenizer
        self._launched = self._committed = 0  # rounds
        self.round: Round | None = None

    def bind(self, round: Round) -> None:
        self.round = round
        round.stop_at(self.stop_token_ids)

    def texts(self) -> list[list[int]]:
        """The committed tokens of all rows; that of a row that never was is a single token."""
        return [[0] if row is None else row.tokens for row in self.rows]

    def generating(self) -> list[int]:
        """Rows that are not complete."""
        return [index for index, row in enumerate(self.rows) if row is not None and row.finish_reason is None]

    def admit(
        self,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        max_new_tokens: int,
        *,
        rng_key: Sequence[int] | None = None,
        states: tuple[RowState | None, RowState | None] = (None, None),
    ) -> None:
        """A new text in a row that has none or whose text is complete. It gets at least one token.

        rng_key: seed and stream, by default (``params.seed``, 0). states: target's and draft's, of the prompt's first
        tokens.

        Raises:
            ValueError: the row is still generating, or there is nothing to generate.
        """
        before = self.rows[index]
        if (before is not None and before.finish_reason is None) or max_new_tokens < 1:
            raise ValueError(f"row {index} is still generating, or has no token to generate ({max_new_tokens})")
        stream = TextStream(self._tokenizer, self._stop_strings, prompt) if self._stop_strings else None
        row = Row(list(prompt), len(prompt) + max_new_tokens, self._launched, stream)
        self.rows[index] = row
        round, (target_state, draft_state) = self.round, states
        round.target.prefill(index, row.tokens[:-1], target_state)
        if round.draft is not None:
            round.draft.prefill(index, row.tokens, draft_state)
        round.sampler.admit(index, row.tokens, params, (params.seed, 0) if rng_key is None else rng_key)
        round.state.admit(index, row.tokens, max_new_tokens)
        row.slot, row.draft_at = 0, (0, len(prompt))

    def retire(self, index: int, reason: str = "stop") -> None:
        """A row's text is complete, as the host alone knows."""
        row = self.rows[index]
        if self.in_flight():
            row.slot = row.draft_at = None  # rounds that are queued go on with it
        row.finish_reason = reason
        self.round.state.leave_out(index)

    def launching(self) -> None:
        """A round is about to be queued."""
        self._launched += 1

    def in_flight(self, besides: int = 0) -> bool:
        """Whether rounds are queued, or were when all broke off: slots may hold the state of another text by now."""
        return self._launched - self._committed > besides

    def commit(self, result: RoundResult, record: list[list[int]], stats: GenerationStats) -> list[CommittedToken]:
        """Appends to each row what it gained in the oldest queued round, up to a stop. All of that, in order.

        Raises:
            ValueError: a row is broken.
        """
        taking_part = [index for index in self.generating() if self.rows[index].first_round <= self._committed]
        for index in taking_part:
            self._refuse_broken(index, record[index])
        fresh = []
        for index in taking_part:
            columns = record[index]
            tokens = self._commit_row(index, columns, result)
            accepted = columns[Record.ACCEPTED]
            stats.count(columns[Record.NUM_DRAFT_TOKENS], accepted, len(tokens))
            fresh += [CommittedToken(index, token, at < accepted) for at, token in enumerate(tokens)]
        self._committed += 1
        return fresh

    def _refuse_broken(self, index: int, record: list[int]) -> None:
        status, draft_status = record[Record.ROW_STATUS], record[Record.DRAFT_STATUS]
        if not (status or draft_status):
            return
        accepted = record[Record.ACCEPTED]
        if self.ends_within(index, record[Record.TOKENS : Record.TOKENS + accepted]):
            record[Record.NUM_COMMITTED] = accepted  # up to a stop string, of which the device does not know
        elif draft_status:
            raise ValueError(f"the draft cannot propose a token: row {index}: {ROW_STATUS_TEXTS[draft_status]}")
        else:
            raise ValueError(f"row {index}, position {accepted} of the window: {ROW_STATUS_TEXTS[status]}")

    def _commit_row(self, index: int, record: list[int], result: RoundResult) -> list[int]:
        row, count, reason = self.rows[index], record[Record.NUM_COMMITTED], record[Record.FINISH_REASON]
        assert count, f"row {index} has ended on the device alone"
        tokens = record[Record.TOKENS : Record.TOKENS + count]
        row.slot = None  # until all is booked
        end = None if row.stream is None else _until_stop_string(row.stream, tokens)
        stopped = end is not None and not (end == count and reason == FinishReason.EOS)
        if stopped:
            del tokens[end:]
        row.tokens += tokens
        if self.output_logits:
            row.logits += result.logits[index, : len(tokens)].clone()
        if result.lookahead:
            row.draft_at = len(tokens) - 1, len(row.tokens)
        if stopped:
            row.finish_reason = "stop"
            self.round.state.leave_out(index)
        elif reason:
            row.finish_reason = FinishReason(reason).name.lower()
        if not stopped or not self.in_flight(besides=1):
            row.slot = len(tokens) - 1
        return tokens

    def ends_within(self, index: int, tokens: Sequence[int]) -> bool:
        """Whether a row's text is complete with some of these tokens behind it."""
        row = self.rows[index]
        if len(tokens) >= row.remaining or not self.stop_token_ids.isdisjoint(tokens):
            return True
        if row.stream is None or not tokens:
            return False
        ahead = copy.deepcopy(row.stream, {id(self._tokenizer): self._tokenizer})
        return _until_stop_string(ahead, tokens) is not None

    def snapshot(self, index: int) -> tuple[RowState | None, RowState | None]:
        """The states of target and draft in a row's slots; None where those hold another text's, or are not kept."""
        row, draft = self.rows[index], self.round.draft
        if row.slot is None or (self.in_flight() and row.finish_reason is None):
            return None, None
        target_state, draft_state = self.round.target.snapshot(index, row.slot, row.tokens[:-1]), None
        if draft is not None and draft.stateful and row.draft_at is not None:
            slot, length = row.draft_at
            draft_state = draft.snapshot(index, slot, row.tokens[:length])
        return target_state, draft_state


def _until_stop_string(stream: TextStream, tokens: Sequence[int]) -> int | None:
    """How many tokens there are up to and with that which completes a stop string; None if none does."""
    for count, token in enumerate(tokens, 1):
        stream.push(token)
        if stream.stopped:
            return count
    return None
