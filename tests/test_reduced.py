"""What --reduced keeps of a test's cases."""

from itertools import product
from types import SimpleNamespace

import pytest
from reduced import cover, params


def case(**values: object) -> SimpleNamespace:
    return SimpleNamespace(callspec=SimpleNamespace(params=values))


@pytest.mark.parametrize("sizes", [(2, 3), (5, 1), (4, 4, 2)])
def test_few_cases_have_every_value_of_every_parameter(sizes: tuple[int, ...]) -> None:
    cases = [case(**dict(zip("abc", place, strict=False))) for place in product(*map(range, sizes))]
    kept = cover(cases)
    assert len(kept) == max(sizes) and set().union(*map(params, kept)) == set().union(*map(params, cases))


def test_a_test_without_parameters_is_kept() -> None:
    alone = SimpleNamespace()
    assert cover([alone]) == [alone] and params(alone) == set()
