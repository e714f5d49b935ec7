"""Which tokens become text, where the rows go on, and what is refused as an argument."""

import itertools
import mmap
from collections.abc import Callable

import pytest
import torch

from speculative_mamba.ops import commit_tokens
from speculative_mamba.ops.commit_tokens import BatchState, FinishReason, Record
from speculative_mamba.ops.recording import record
from speculative_mamba.testing.tolerance import assert_bitwise_equal

V, STOPS = 50, (46, 48, 49)
NONE, EOS, LENGTH = FinishReason
INACTIVE, BROKEN = "not active", "broken"


class Rows:
    """Arguments of the op: every tensor filled with numbers that differ from row to row."""

    def __init__(self, rows: int, lookahead: int, seed: int = 0, steps: int | None = None, capacity: int = 30) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        steps, number = steps or lookahead + 1, self.number
        self.window = {
            "draft_tokens": number(1, 10, rows, lookahead), "accepted": number(0, lookahead + 1, rows).int(),
            "next_token": number(1, 10, rows), "row_status": torch.zeros(rows, dtype=torch.int32),
            "draft_status": torch.zeros(lookahead, rows, dtype=torch.int32),
            "num_draft_tokens": number(0, lookahead + 3, rows).int(),
        }  # fmt: skip
        self.is_stop = torch.zeros(rows, V, dtype=torch.bool)
        self.is_stop[:, list(STOPS)] = True
        self.state = {
            "last": number(0, V, rows, 2), "positions": number(1, capacity, rows),
            "remaining": number(1, 10, rows).int(), "active": torch.ones(rows, dtype=torch.bool),
            "slots": number(0, 99, steps, rows).int(),
        }  # fmt: skip
        self.output_counts, self.text = number(0, 4, rows, V).int(), number(-9, 0, rows, capacity)

    def number(self, least: int, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, end, shape, generator=self.generator)

    def set(self, row: int, state: str | None) -> None:
        """A row that cannot be decided, in every other case for the draft's logits, is broken."""
        self.state["active"][row] = state != INACTIVE
        statuses = self.window["draft_status"][:1] if row % 2 and len(self.window["draft_status"]) else None
        of_target = self.window["row_status"]
        if statuses is not None and self.window["num_draft_tokens"][row]:
            statuses[0, row] = 1 + row % 5 if state else 0
        else:
            of_target[row] = 1 + row % 5 if state else 0

    def written(self) -> dict[str, torch.Tensor]:
        """All tensors that the op may write."""
        return {"output_counts": self.output_counts, "text": self.text} | self.state

    def only(self, rows: list[int]) -> "Rows":
        """A copy of these rows."""

        def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:, rows].contiguous() if name in ("slots", "draft_status") else tensor[rows]

        chosen = Rows.__new__(Rows)
        chosen.window = {name: part(name, tensor) for name, tensor in self.window.items()}
        chosen.state = {name: part(name, tensor) for name, tensor in self.state.items()}
        chosen.is_stop, chosen.output_counts, chosen.text = (
            tensor[rows] for tensor in (self.is_stop, self.output_counts, self.text)
        )
        return chosen

    def copy(self) -> "Rows":
        return self.only(list(range(len(self.output_counts))))

    def commit(self, backend: str) -> torch.Tensor:
        return commit_tokens(
            **self.window,
            is_stop=self.is_stop,
            state=BatchState(**self.state),
            output_counts=self.output_counts,
            text=self.text,
            backend=backend,
        )


def assert_same(rows: Rows, expected: Rows) -> None:
    for name, tensor in expected.written().items():
        assert_bitwise_equal(rows.written()[name], tensor, name)


def every_case(lookahead: int) -> Rows:
    """Every count of accepted tokens, place of a stop token, and budget, and a few rows that are broken or not active.

    Stop tokens also stand behind what was accepted, and in half of the rows twice.
    """
    cases = list(itertools.product(range(lookahead + 1), range(-1, lookahead + 1), range(lookahead + 4)))
    rows = Rows(len(cases), lookahead, steps=lookahead + 3)
    for row, (accepted, stop, remaining) in enumerate(cases):
        rows.window["accepted"][row], rows.state["remaining"][row] = accepted, remaining
        tokens = torch.cat([rows.window["draft_tokens"][row], rows.window["next_token"][row, None]])
        if stop >= 0:
            tokens[stop] = STOPS[row % 3]
            if row % 2:
                tokens[-1] = STOPS[0]
        rows.window["draft_tokens"][row], rows.window["next_token"][row] = tokens[:-1], tokens[-1]
        rows.set(row, {0: INACTIVE, 1: BROKEN}.get(row % 7))
        if row % 5 == 4:  # has no stop tokens, but for one that is an ordinary token in other rows
            rows.is_stop[row] = False
            rows.is_stop[row, 1 + row % 9] = True
        if row % 7 in (2, 3):  # of one step, which may not count
            rows.window["draft_status"][row % max(lookahead, 1) : row % max(lookahead, 1) + 1, row] = 1 + row % 5
    return rows


@pytest.mark.parametrize("lookahead", range(5))
def test_every_case_is_as_specified(lookahead: int, kernels: str) -> None:
    """Catches: a budget ignored; a stop token left out; a broken row that goes on; refused tokens seen."""
    rows = every_case(lookahead)
    expected = rows.copy()
    assert_bitwise_equal(rows.commit(kernels), expected.commit("reference"), "record")
    assert_same(rows, expected)


@pytest.mark.parametrize("lookahead", [1, 3, 15, 31, 32, 70])
def test_rounds_after_rounds(lookahead: int, kernels: str) -> None:
    """Rows end in different rounds, for every reason, and stay as they are from then on.

    Catches: the status of a row that is not active; a warp that looks at half of its lanes, or at 32 tokens only.
    """
    count = 40
    rows = Rows(count, lookahead, seed=lookahead, steps=lookahead + 2, capacity=3 * lookahead)
    rows.state["remaining"] = rows.number(1, 4 * lookahead + 1, count).int()
    expected, ended = rows.copy(), {}
    for step in range(6):
        window = Rows(count, lookahead, seed=100 * lookahead + step).window
        window["draft_tokens"][::3] = rows.number(0, V, *window["draft_tokens"][::3].shape)
        window["row_status"][step::11] = 3
        window["draft_status"][0, step::13] = 2
        rows.window = expected.window = window
        record = rows.commit(kernels)
        assert_bitwise_equal(record, expected.commit("reference"), "record")
        assert_same(rows, expected)
        for row, before in ended.items():
            assert_same(rows.only([row]), before)
            assert not record[row].any()
        ended |= {row: rows.only([row]) for row in (~rows.state["active"]).nonzero()[:, 0].tolist() if row not in ended}
    assert len(ended) > count // 2


# Of one row with last tokens 7, 8 and three draft tokens: accepted, draft tokens and the next one, remaining, its kind;
# then how many tokens are committed, the last two of the text, remaining and why the row has ended.
EXAMPLES = {
    "all accepted": ((3, [1, 2, 3, 4], 10, None), (4, [3, 4], 6, NONE)),
    "some accepted": ((2, [1, 2, 5, 4], 10, None), (3, [2, 4], 7, NONE)),
    "one accepted": ((1, [1, 5, 5, 4], 10, None), (2, [1, 4], 8, NONE)),
    "none accepted": ((0, [5, 5, 5, 4], 10, None), (1, [8, 4], 9, NONE)),
    "stop token at once": ((3, [49, 2, 3, 4], 10, None), (1, [8, 49], 9, EOS)),
    "stop token within": ((3, [1, 2, 46, 4], 10, None), (3, [2, 46], 7, EOS)),
    "stop token at the end": ((3, [1, 2, 3, 48], 10, None), (4, [3, 48], 6, EOS)),
    "the first of two stop tokens": ((3, [1, 48, 49, 4], 10, None), (2, [1, 48], 8, EOS)),
    "a refused stop token": ((1, [1, 49, 5, 4], 10, None), (2, [1, 4], 8, NONE)),
    "a stop token for all": ((0, [5, 5, 5, 46], 10, None), (1, [8, 46], 9, EOS)),
    "one more remains": ((3, [1, 2, 3, 4], 5, None), (4, [3, 4], 1, NONE)),
    "the last of the budget": ((3, [1, 2, 3, 4], 4, None), (4, [3, 4], 0, LENGTH)),
    "more than the budget": ((3, [1, 2, 3, 4], 2, None), (2, [1, 2], 0, LENGTH)),
    "one token left": ((3, [1, 2, 3, 4], 1, None), (1, [8, 1], 0, LENGTH)),
    "no token left": ((3, [1, 2, 3, 4], 0, None), (0, [7, 8], 0, LENGTH)),
    "a stop token behind the budget": ((3, [1, 49, 3, 4], 1, None), (1, [8, 1], 0, LENGTH)),
    "stop token and budget": ((3, [1, 49, 3, 4], 2, None), (2, [1, 49], 0, EOS)),
    BROKEN: ((2, [1, 2, 5, 4], 10, BROKEN), (0, [7, 8], 10, NONE)),
    INACTIVE: ((2, [1, 2, 5, 4], 10, INACTIVE), (0, [7, 8], 10, NONE)),
}


def test_examples_by_hand(backend: str) -> None:
    """All of them as the rows of one call.

    Catches: a budget ignored; a stop token left out; a broken row that goes on; refused tokens seen.
    """
    rows = Rows(len(EXAMPLES), 3, steps=6)
    state = rows.state
    state["last"][:], state["positions"][:] = torch.tensor([7, 8]), 10
    rows.output_counts[:], rows.text[:] = 0, -1
    for row, ((accepted, tokens, remaining, kind), _) in enumerate(EXAMPLES.values()):
        rows.window["draft_tokens"][row], rows.window["next_token"][row] = torch.tensor(tokens[:3]), tokens[3]
        rows.window["accepted"][row], state["remaining"][row] = accepted, remaining
        rows.set(row, kind)
    record = rows.commit(backend)
    assert record.dtype == torch.int64
    for row, (name, ((accepted, tokens, _, kind), (count, last, remaining, reason))) in enumerate(EXAMPLES.items()):
        window = [*tokens[:accepted], tokens[3]]
        counted = min(3, int(rows.window["num_draft_tokens"][row]))
        of_draft = bool(kind == BROKEN and row % 2 and counted)
        statuses = [0, 1 + row % 5] if of_draft else [1 + row % 5, 0]
        listed = [count, accepted, *(statuses if kind == BROKEN else [0, 0]), counted, reason]
        listed += [*window, *[0] * (3 - accepted)]
        assert record[row].tolist() == ([0] * 10 if kind == INACTIVE else listed), name
        active = reason == NONE and kind is None
        assert state["last"][row].tolist() == last and state["positions"][row] == 10 + count, name
        assert state["remaining"][row] == remaining and state["active"][row] == active, name
        assert state["slots"][:, row].tolist() == ([count - 1, 1, 2, 3, 4, 5] if active else [-1] * 6), name
        assert rows.output_counts[row].tolist() == [window[:count].count(token) for token in range(V)], name
        assert rows.text[row].tolist() == [-1] * 10 + window[:count] + [-1] * (20 - count), name


# Status of each of three draft steps, how many draft tokens count, where a stop token is; the status of the row.
DRAFT_STATUSES = {
    "all count": ([0, 2, 1], 3, None, 2), "more than all count": ([0, 0, 4], 9, None, 4),
    "what does not count": ([0, 0, 3], 2, None, 0), "none counts": ([5, 5, 5], 0, None, 0),
    "at a stop token": ([0, 3, 0], 3, 1, 3), "behind a stop token": ([0, 0, 3], 3, 1, 0),
    "a stop token that does not count": ([0, 3, 0], 1, 1, 0),
}  # fmt: skip


def test_the_status_of_draft_tokens_that_count(backend: str) -> None:
    """Whether or not they were accepted."""
    for accepted in range(4):
        rows = Rows(len(DRAFT_STATUSES), 3)
        rows.window["accepted"][:] = accepted
        for row, (statuses, count, stop, _) in enumerate(DRAFT_STATUSES.values()):
            rows.window["draft_status"][:, row], rows.window["num_draft_tokens"][row] = torch.tensor(statuses), count
            if stop is not None:
                rows.window["draft_tokens"][row, stop] = STOPS[0]
        record = rows.commit(backend)
        expected = [status for *_, status in DRAFT_STATUSES.values()]
        assert record[:, Record.DRAFT_STATUS].tolist() == expected
        assert (record[:, Record.NUM_COMMITTED] == 0).tolist() == [status > 0 for status in expected]


def test_what_does_not_fit_into_the_text_is_not_written(backend: str) -> None:
    """Catches: tokens written into the next row's text."""
    rows = Rows(4, 3, capacity=5)
    rows.window["accepted"][:], rows.state["positions"][:] = 3, torch.tensor([3, 4, 5, 1])
    rows.state["remaining"][:], rows.text[:] = 10, -1
    tokens = torch.cat([rows.window["draft_tokens"], rows.window["next_token"][:, None]], 1).tolist()
    assert rows.commit(backend)[:, Record.NUM_COMMITTED].tolist() == [4] * 4
    expected = [[-1] * 3 + tokens[0][:2], [-1] * 4 + tokens[1][:1], [-1] * 5, [-1, *tokens[3]]]
    assert rows.text.tolist() == expected
    assert rows.state["positions"].tolist() == [7, 8, 9, 5]


def test_a_token_may_come_twice(backend: str) -> None:
    rows = Rows(1, 3)
    rows.window["draft_tokens"][:], rows.window["accepted"][:], rows.window["next_token"][:] = 5, 3, 5
    rows.state["remaining"][:], rows.output_counts[:] = 10, 0
    rows.commit(backend)
    assert rows.output_counts[0].nonzero().tolist() == [[5]] and rows.output_counts[0, 5] == 4
    assert rows.state["last"].tolist() == [[5, 5]]


@pytest.mark.parametrize("without", [("output_counts",), ("text",), ("output_counts", "text")], ids="+".join)
def test_without_counts_or_text(without: tuple[str, ...], backend: str) -> None:
    rows = every_case(2).only(list(range(0, 60, 4)))
    expected = rows.copy()
    for name in without:
        setattr(rows, name, None)
    assert_bitwise_equal(rows.commit(backend), expected.commit(backend), "record")
    for name in set(expected.written()) - set(without):
        assert_bitwise_equal(rows.written()[name], expected.written()[name], name)


def test_all_draft_tokens_count_and_are_well_unless_told_otherwise(backend: str) -> None:
    rows = every_case(2).only(list(range(0, 60, 4)))
    expected = rows.copy()
    expected.window["draft_status"][:], expected.window["num_draft_tokens"][:] = 0, 2
    rows.window |= {"draft_status": None, "num_draft_tokens": None}
    assert_bitwise_equal(rows.commit(backend), expected.commit(backend), "record")
    for name in expected.written():
        assert_bitwise_equal(rows.written()[name], expected.written()[name], name)


def test_the_largest_budget(backend: str) -> None:
    rows = Rows(1, 3)
    rows.state["remaining"][:] = torch.iinfo(torch.int32).max
    count = rows.commit(backend)[0, Record.NUM_COMMITTED].item()
    assert count == rows.window["accepted"][0] + 1 and rows.state["active"].all()
    assert rows.state["remaining"][0].item() == torch.iinfo(torch.int32).max - count


def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    rows = every_case(2).only(list(range(0, 60, 5)))
    before = rows.copy()
    record = rows.commit(backend)
    for row in range(len(record)):
        alone = before.only([row])
        assert_bitwise_equal(alone.commit(backend), record[row : row + 1], "record")
        assert_same(alone, rows.only([row]))


def test_inputs_are_not_written(backend: str) -> None:
    rows = every_case(2).only(list(range(0, 60, 4)))
    before = rows.copy()
    rows.commit(backend)
    for name, tensor in before.window.items():
        assert_bitwise_equal(rows.window[name], tensor, name)
    assert_bitwise_equal(rows.is_stop, before.is_stop, "is_stop")


def test_no_rows(backend: str) -> None:
    rows = Rows(0, 3)
    assert rows.commit(backend).shape == (0, 10)


def test_a_recorded_call_goes_on_from_the_call_before(cpu: str) -> None:
    rows = Rows(9, 3, capacity=12)
    expected = rows.copy()
    for step in range(4):
        if step == 0:
            committed, recording = record(torch.empty(0), rows.commit, cpu)
        else:
            recording.run()
        assert_bitwise_equal(committed, expected.commit("reference"), "record")
        assert_same(rows, expected)
        for name, tensor in Rows(9, 3, seed=step).window.items():
            rows.window[name].copy_(tensor)
            expected.window[name].copy_(tensor)


def test_a_text_beyond_32_bits(request: pytest.FixtureRequest, kernels: str) -> None:
    """Its memory is never touched, and so never there, but for the end of the last row. Catches: offsets of 32 bits."""
    if "on gpu" in request.node.callspec.params["kernels"]:
        pytest.skip("would copy gigabytes to the GPU and back")
    rows, no_reserve = Rows(2, 3), 0x4000
    try:
        mapping = mmap.mmap(-1, 2**35 + 2**12, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"this machine gives no sparse mapping: {error}")
    rows.text = torch.frombuffer(mapping, dtype=torch.int64).view(2, -1)
    rows.state["positions"][:] = torch.tensor([0, 2**31])
    record = rows.commit(kernels)
    for row, at in ((0, 0), (1, 2**31)):
        count = record[row, Record.NUM_COMMITTED]
        assert torch.equal(rows.text[row, at : at + count], record[row, Record.TOKENS : Record.TOKENS + count])


def refused(match: str, backend: str, change: Callable[[Rows], None]) -> None:
    rows = Rows(3, 4)
    change(rows)
    written = {name: tensor.clone() for name, tensor in rows.written().items()}
    with pytest.raises(ValueError, match=match) as caught:
        rows.commit(backend)
    assert "\n" not in str(caught.value)
    for name, before in written.items():
        assert before.is_meta or torch.equal(rows.written()[name], before), f"{name} was written before the error"


def holder_of(rows: Rows, name: str) -> tuple[dict[str, torch.Tensor], str]:
    """What holds a tensor, and its name in messages."""
    if name in rows.state:
        return rows.state, f"state.{name}"
    return (rows.window if name in rows.window else vars(rows)), name


@pytest.mark.parametrize("name", [*Rows(1, 1).window, "is_stop", "output_counts", "text", *Rows(1, 1).state])
def test_arguments_that_do_not_fit_are_named(name: str, backend: str) -> None:
    said = holder_of(Rows(3, 4), name)[1]

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Rows], None]:
        def apply(rows: Rows) -> None:
            holder, _ = holder_of(rows, name)
            holder[name] = change(holder[name])

        return apply

    refused(
        r"\bmeta\b" if name in ("draft_tokens", "last") else rf"{said}\b.*\bmeta\b",
        backend,
        changed(lambda t: t.to("meta")),
    )
    refused(rf"{said} must be torch", backend, changed(lambda t: t.to(torch.int16)))
    refused(rf"{said} must have shape", backend, changed(lambda t: t[None]))
    if name not in ("draft_tokens", "last"):  # which set the sizes
        rows_at = 1 if name in ("slots", "draft_status") else 0
        refused(rf"{said} must have shape", backend, changed(lambda t: torch.cat([t, t], rows_at)))
    refused(rf"{said} must be contiguous", backend, changed(lambda t: t.repeat_interleave(2, -1)[..., ::2]))


def change_of(path: str, value: object, *index: int) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        holder, _ = holder_of(rows, path)
        if index:
            holder[path][index] = value
        else:
            holder[path] = value

    return change


def of_more_rows(rows: Rows) -> None:
    rows.state = rows.only([0, 1, 2, 0, 1, 2]).state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("draft_tokens", V, 1, 2), "^draft_tokens must hold token ids from 0 to 49, got"),
        (change_of("next_token", -1, 1), "^next_token must hold token ids from 0 to 49, got"),
        (change_of("accepted", 5, 1), "^accepted must be from 0 to 4, got"),
        (change_of("accepted", -1, 1), "^accepted must be from 0 to 4, got"),
        (change_of("positions", -1, 2), "^state.positions must be from 0 to inf, got"),
        (change_of("remaining", -1, 0), "^state.remaining must be from 0 to inf, got"),
        (of_more_rows, r"^state.last must have shape \(3, 2\), got \(6, 2\)"),
        (change_of("is_stop", torch.zeros(3, 0, dtype=torch.bool)), r"^is_stop must have shape \(B, V\), got \(3, 0\)"),
        (
            change_of("slots", torch.zeros(4, 3, dtype=torch.int32)),
            r"^state.slots must have at least 5 steps, got \(4, 3\)",
        ),
    ],
)
def test_values_and_sizes_that_make_no_sense(change: Callable[[Rows], None], message: str, backend: str) -> None:
    refused(message, backend, change)
