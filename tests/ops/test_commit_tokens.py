"""Which tokens become text, where the rows go on, and what is refused as an argument."""

import itertools
import mmap
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from speculative_mamba.ops import commit_tokens
from speculative_mamba.ops.commit_tokens import BatchState
from speculative_mamba.ops.recording import Recording
from speculative_mamba.testing.tolerance import assert_bitwise_equal

V, STOPS = 50, (46, 48, 49)
NAMES = [field.name for field in fields(BatchState)]
INACTIVE, BROKEN = "not active", "broken"


class Rows:
    """Arguments of the op: every tensor filled with numbers that differ from row to row."""

    def __init__(self, rows: int, lookahead: int, seed: int = 0, steps: int | None = None, capacity: int = 30) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        steps, number = steps or lookahead + 1, self.number
        self.window = {
            "drafted": number(1, 10, rows, lookahead), "accepted": number(0, lookahead + 1, rows).int(),
            "following": number(1, 10, rows), "verdicts": torch.zeros(rows, dtype=torch.int32),
            "limits": number(0, lookahead + 3, rows).int(),
        }  # fmt: skip
        self.is_stop = torch.zeros(V, dtype=torch.bool)
        self.is_stop[list(STOPS)] = True
        self.places = BatchState(
            number(0, V, rows, 2), number(1, capacity, rows), number(0, 9, rows).int(),
            torch.ones(rows, dtype=torch.bool), number(0, 99, steps, rows).int(),
        )  # fmt: skip
        self.output_counts, self.text = number(0, 4, rows, V).int(), number(-9, 0, rows, capacity)

    def number(self, least: int, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, end, shape, generator=self.generator)

    def set(self, row: int, state: str | None) -> None:
        self.places.active[row] = state != INACTIVE
        self.window["verdicts"][row] = 1 + row % 5 if state else 0

    def written(self) -> dict[str, torch.Tensor]:
        """All tensors that the op may write."""
        return {"output_counts": self.output_counts, "text": self.text} | {
            name: getattr(self.places, name) for name in NAMES
        }

    def only(self, rows: list[int]) -> "Rows":
        """A copy of these rows."""
        chosen = Rows.__new__(Rows)
        chosen.window, chosen.is_stop = {name: part[rows] for name, part in self.window.items()}, self.is_stop
        of_rows = {name: part[rows] for name, part in vars(self.places).items() if name != "slots"}
        chosen.places = BatchState(**of_rows, slots=self.places.slots[:, rows].contiguous())
        chosen.output_counts, chosen.text = self.output_counts[rows], self.text[rows]
        return chosen

    def copy(self) -> "Rows":
        return self.only(list(range(len(self.output_counts))))

    def commit(self, backend: str) -> torch.Tensor:
        return commit_tokens(
            **self.window,
            is_stop=self.is_stop,
            rows=self.places,
            output_counts=self.output_counts,
            text=self.text,
            backend=backend,
        )


def assert_same(rows: Rows, expected: Rows) -> None:
    for name, tensor in expected.written().items():
        assert_bitwise_equal(rows.written()[name], tensor, name)


def every_case(lookahead: int) -> Rows:
    """Every count of accepted tokens, place of a stop token, and room, and a few rows that are broken or not active.

    Stop tokens also stand behind what was accepted, and in half of the rows twice.
    """
    cases = list(itertools.product(range(lookahead + 1), range(-1, lookahead + 1), range(-1, lookahead + 3)))
    rows = Rows(len(cases), lookahead, steps=lookahead + 3)
    for row, (accepted, stop, room) in enumerate(cases):
        rows.window["accepted"][row], rows.places.room[row] = accepted, room
        tokens = torch.cat([rows.window["drafted"][row], rows.window["following"][row, None]])
        if stop >= 0:
            tokens[stop] = STOPS[row % 3]
            if row % 2:
                tokens[-1] = STOPS[0]
        rows.window["drafted"][row], rows.window["following"][row] = tokens[:-1], tokens[-1]
        rows.set(row, {0: INACTIVE, 1: BROKEN}.get(row % 7))
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
    rows.places.room = rows.number(0, 4 * lookahead, count).int()
    expected, ended = rows.copy(), {}
    for step in range(6):
        window = Rows(count, lookahead, seed=100 * lookahead + step).window
        window["drafted"][::3] = rows.number(0, V, *window["drafted"][::3].shape)
        window["verdicts"][step::11] = 3
        rows.window = expected.window = window
        record = rows.commit(kernels)
        assert_bitwise_equal(record, expected.commit("reference"), "record")
        assert_same(rows, expected)
        for row, before in ended.items():
            assert_same(rows.only([row]), before)
            assert not record[row].any()
        ended |= {row: rows.only([row]) for row in (~rows.places.active).nonzero()[:, 0].tolist() if row not in ended}
    assert len(ended) > count // 2


# Of one row with last tokens 7, 8 and three drafted tokens: accepted, drafted and following tokens, room, its state;
# then how many tokens are committed, and the last two of the text, room and whether the row is active afterwards.
EXAMPLES = {
    "all accepted": ((3, [1, 2, 3, 4], 9, None), (4, [3, 4], 5, True)),
    "some accepted": ((2, [1, 2, 5, 4], 9, None), (3, [2, 4], 6, True)),
    "one accepted": ((1, [1, 5, 5, 4], 9, None), (2, [1, 4], 7, True)),
    "none accepted": ((0, [5, 5, 5, 4], 9, None), (1, [8, 4], 8, True)),
    "stop token at once": ((3, [49, 2, 3, 4], 9, None), (1, [8, 49], 8, False)),
    "stop token within": ((3, [1, 2, 46, 4], 9, None), (3, [2, 46], 6, False)),
    "stop token at the end": ((3, [1, 2, 3, 48], 9, None), (4, [3, 48], 5, False)),
    "the first of two stop tokens": ((3, [1, 48, 49, 4], 9, None), (2, [1, 48], 7, False)),
    "a refused stop token": ((1, [1, 49, 5, 4], 9, None), (2, [1, 4], 7, True)),
    "a stop token for all": ((0, [5, 5, 5, 46], 9, None), (1, [8, 46], 8, False)),
    "room for one more": ((3, [1, 2, 3, 4], 4, None), (4, [3, 4], 0, True)),
    "the last of the budget": ((3, [1, 2, 3, 4], 3, None), (4, [3, 4], -1, False)),
    "more than the budget": ((3, [1, 2, 3, 4], 1, None), (2, [1, 2], -1, False)),
    "one token left": ((3, [1, 2, 3, 4], 0, None), (1, [8, 1], -1, False)),
    "no token left": ((3, [1, 2, 3, 4], -1, None), (0, [7, 8], -1, False)),
    "a stop token behind the budget": ((3, [1, 49, 3, 4], 0, None), (1, [8, 1], -1, False)),
    "stop token and budget": ((3, [1, 49, 3, 4], 1, None), (2, [1, 49], -1, False)),
    BROKEN: ((2, [1, 2, 5, 4], 9, BROKEN), (0, [7, 8], 9, False)),
    INACTIVE: ((2, [1, 2, 5, 4], 9, INACTIVE), (0, [7, 8], 9, False)),
}


def test_examples_by_hand(backend: str) -> None:
    """All of them as the rows of one call.

    Catches: a budget ignored; a stop token left out; a broken row that goes on; refused tokens seen.
    """
    rows = Rows(len(EXAMPLES), 3, steps=6)
    rows.places.last[:], rows.places.positions[:] = torch.tensor([7, 8]), 10
    rows.output_counts[:], rows.text[:] = 0, -1
    for row, ((accepted, tokens, room, state), _) in enumerate(EXAMPLES.values()):
        rows.window["drafted"][row], rows.window["following"][row] = torch.tensor(tokens[:3]), tokens[3]
        rows.window["accepted"][row], rows.places.room[row] = accepted, room
        rows.set(row, state)
    record, places = rows.commit(backend), rows.places
    assert record.dtype == torch.int64
    for row, (name, ((accepted, tokens, _, state), (count, last, room, active))) in enumerate(EXAMPLES.items()):
        window = [*tokens[:accepted], tokens[3]]
        verdict = 1 + row % 5 if state == BROKEN else 0
        counted = min(3, int(rows.window["limits"][row]))
        listed = [count, accepted, verdict, counted, *window, *[0] * (3 - accepted)]
        assert record[row].tolist() == ([0] * 8 if state == INACTIVE else listed), name
        assert places.last[row].tolist() == last and places.positions[row] == 10 + count, name
        assert places.room[row] == room and places.active[row] == active, name
        assert places.slots[:, row].tolist() == ([count - 1, 1, 2, 3, 4, 5] if active else [-1] * 6), name
        assert rows.output_counts[row].tolist() == [window[:count].count(token) for token in range(V)], name
        assert rows.text[row].tolist() == [-1] * 10 + window[:count] + [-1] * (20 - count), name


def test_what_does_not_fit_into_the_text_is_not_written(backend: str) -> None:
    """Catches: tokens written into the next row's text."""
    rows = Rows(4, 3, capacity=5)
    rows.window["accepted"][:], rows.places.positions[:] = 3, torch.tensor([3, 4, 5, 1])
    rows.places.room[:], rows.text[:] = 9, -1
    tokens = torch.cat([rows.window["drafted"], rows.window["following"][:, None]], 1).tolist()
    assert rows.commit(backend)[:, 0].tolist() == [4] * 4
    expected = [[-1] * 3 + tokens[0][:2], [-1] * 4 + tokens[1][:1], [-1] * 5, [-1, *tokens[3]]]
    assert rows.text.tolist() == expected
    assert rows.places.positions.tolist() == [7, 8, 9, 5]


def test_a_token_may_come_twice(backend: str) -> None:
    rows = Rows(1, 3)
    rows.window["drafted"][:], rows.window["accepted"][:], rows.window["following"][:] = 5, 3, 5
    rows.places.room[:], rows.output_counts[:] = 9, 0
    rows.commit(backend)
    assert (
        rows.output_counts[0].nonzero().tolist() == [[5]]
        and rows.output_counts[0, 5] == 4
        and rows.places.last.tolist() == [[5, 5]]
    )


@pytest.mark.parametrize("without", [("output_counts",), ("text",), ("output_counts", "text")], ids="+".join)
def test_without_counts_or_text(without: tuple[str, ...], backend: str) -> None:
    rows = every_case(2).only(list(range(0, 60, 4)))
    expected = rows.copy()
    for name in without:
        setattr(rows, name, None)
    assert_bitwise_equal(rows.commit(backend), expected.commit(backend), "record")
    for name in set(expected.written()) - set(without):
        assert_bitwise_equal(rows.written()[name], expected.written()[name], name)


def test_the_largest_budget(backend: str) -> None:
    rows = Rows(1, 3)
    rows.places.room[:] = torch.iinfo(torch.int32).max
    count = rows.commit(backend)[0, 0].item()
    assert count == rows.window["accepted"][0] + 1 and rows.places.active.all()
    assert rows.places.room[0].item() == torch.iinfo(torch.int32).max - count


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
    assert rows.is_stop.nonzero()[:, 0].tolist() == list(STOPS)


def test_no_rows(backend: str) -> None:
    rows = Rows(0, 3)
    assert rows.commit(backend).shape == (0, 8)


def test_a_recorded_call_goes_on_from_the_call_before(cpu: str) -> None:
    rows = Rows(9, 3, capacity=12)
    expected, recording = rows.copy(), Recording(torch.empty(0))
    for step in range(4):
        if step == 0:
            with recording.record():
                record = rows.commit(cpu)
        else:
            recording.run()
        assert_bitwise_equal(record, expected.commit("reference"), "record")
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
    rows.places.positions[:] = torch.tensor([0, 2**31])
    record = rows.commit(kernels)
    for row, at in ((0, 0), (1, 2**31)):
        count = record[row, 0]
        assert torch.equal(rows.text[row, at : at + count], record[row, 4 : 4 + count])


def refused(match: str, backend: str, change: Callable[[Rows], None]) -> None:
    rows = Rows(3, 4)
    change(rows)
    written = {name: tensor.clone() for name, tensor in rows.written().items()}
    with pytest.raises(ValueError, match=match) as caught:
        rows.commit(backend)
    assert "\n" not in str(caught.value)
    for name, before in written.items():
        assert before.is_meta or torch.equal(rows.written()[name], before), f"{name} was written before the error"


def place(rows: Rows, name: str) -> tuple[object, str, str]:
    """What holds a tensor, as which key, and its name in messages."""
    if name in NAMES:
        return vars(rows.places), name, f"rows.{name}"
    return (rows.window if name in rows.window else vars(rows)), name, name


@pytest.mark.parametrize(
    "name", ["drafted", "accepted", "following", "verdicts", "limits", "is_stop", "output_counts", "text", *NAMES]
)
def test_arguments_that_do_not_fit_are_named(name: str, backend: str) -> None:
    said = place(Rows(3, 4), name)[2]

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Rows], None]:
        def apply(rows: Rows) -> None:
            holder, key, _ = place(rows, name)
            holder[key] = change(holder[key])

        return apply

    refused(r"\bmeta\b" if name == "drafted" else rf"{said}\b.*\bmeta\b", backend, changed(lambda t: t.to("meta")))
    refused(rf"{said} must be torch", backend, changed(lambda t: t.to(torch.int16)))
    refused(rf"{said} must have shape", backend, changed(lambda t: t[None]))
    if name not in ("drafted", "is_stop"):  # which set the sizes
        rows_at = 1 if name == "slots" else 0
        refused(rf"{said} must have shape", backend, changed(lambda t: torch.cat([t, t], rows_at)))
    refused(rf"{said} must be contiguous", backend, changed(lambda t: t.repeat_interleave(2, -1)[..., ::2]))


def change_of(path: str, value: object, *index: int) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        holder, key, _ = place(rows, path)
        if index:
            holder[key][index] = value
        else:
            holder[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("drafted", V, 1, 2), "^drafted must hold token ids from 0 to 49, got"),
        (change_of("following", -1, 1), "^following must hold token ids from 0 to 49, got"),
        (change_of("accepted", 5, 1), "^accepted must be from 0 to 4, got"),
        (change_of("accepted", -1, 1), "^accepted must be from 0 to 4, got"),
        (change_of("positions", -1, 2), "^rows.positions must be from 0 to inf, got"),
        (change_of("room", -2, 0), "^rows.room must be from -1 to inf, got"),
        (change_of("is_stop", torch.zeros(0, dtype=torch.bool)), r"^is_stop must have shape \(V\), got \(0,\)"),
        (
            change_of("slots", torch.zeros(4, 3, dtype=torch.int32)),
            r"^rows.slots must have shape \(S, 3\) with S of at least 5, got \(4, 3\)",
        ),
    ],
)
def test_values_and_sizes_that_make_no_sense(change: Callable[[Rows], None], message: str, backend: str) -> None:
    refused(message, backend, change)
