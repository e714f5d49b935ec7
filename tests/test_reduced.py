"""Which of a test's cases run, by default and with --reduced."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
from reduced import cover, cover_pairs, params


def case(together: str = "", **values: object) -> SimpleNamespace:
    marks = [SimpleNamespace(args=(together,))] if together else []
    return SimpleNamespace(callspec=SimpleNamespace(params=values), iter_markers=lambda name: marks)


def pairs(cases: list[SimpleNamespace], names: list[tuple[str, ...]]) -> set[tuple]:
    values = [[tuple(case.callspec.params[name] for name in axis) for axis in names] for case in cases]
    return {(*which, *pair) for each in values for which, pair in zip(PLACES, combinations(each, 2), strict=True)}


PLACES = list(combinations(range(3), 2))


@pytest.mark.parametrize("sizes", [(2, 3), (5, 1), (4, 4, 2)])
def test_few_cases_have_every_value_of_every_parameter(sizes: tuple[int, ...]) -> None:
    cases = [case(**dict(zip("abc", place, strict=False))) for place in product(*map(range, sizes))]
    kept = cover(cases)
    assert len(kept) == max(sizes) and set().union(*map(params, kept)) == set().union(*map(params, cases))


def test_a_test_without_parameters_is_kept() -> None:
    alone = SimpleNamespace()
    assert cover([alone]) == [alone] and params(alone) == set()
    alone.iter_markers = lambda name: []
    assert cover_pairs([alone]) == [alone]


@pytest.mark.parametrize(("sizes", "most"), [((4, 4, 4), 24), ((30, 7, 2), 210), ((3, 3, 2), 11)])
def test_fewer_cases_have_every_two_values(sizes: tuple[int, ...], most: int) -> None:
    """Whatever else does not vary, and though some combinations are not there."""
    names = [("a",), ("b",), ("c",)]
    cases = [case(**dict(zip("abcd", (*place, 0), strict=True))) for place in product(*map(range, sizes))][1:]
    kept = cover_pairs(cases)
    assert max(sizes) < len(kept) <= most < len(cases) and pairs(kept, names) == pairs(cases, names)
    assert kept == [case for case in cases if case in kept]


def test_of_two_parameters_every_case_is_kept() -> None:
    cases = [case(a=a, b=b, same=1) for a, b in product(range(5), range(4))]
    assert cover_pairs(cases) == cases
    table = [case("row, column", row=a, column=b, c=c) for a, b, c in product(range(3), range(4), range(2))]
    assert cover_pairs(table) == table, "what a mark names together is one parameter"


def test_a_table_is_one_of_three_parameters() -> None:
    cases = [case("row, column", row=a, column=a % 3, b=b, c=c) for a, b, c in product(range(6), range(4), range(2))]
    names, kept = [("row", "column"), ("b",), ("c",)], cover_pairs(cases)
    assert len(kept) == 24 and pairs(kept, names) == pairs(cases, names)
