"""Which tests run on Triton's interpreter, which takes seconds where kernels take milliseconds."""

from collections import defaultdict

import pytest
from reduced import cover, params

INTERPRETED = "triton interpreted"
TABLE = 10  # a parameter of as many values is a table of cases, and tests of a file take turns with its rows
TURNS = 3


def without_most_interpreted(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each test every value of every parameter, but not every combination; of a table that several tests of a file
    share a part each, together all of it. Tests against float64, with fixture ``kernels``, take all of a table."""
    tests = defaultdict(list)
    for item in items:
        if INTERPRETED in (value for _, value in params(item)):
            tests[item.path, item.originalname].append(item)
    sharing = defaultdict(list)
    for (path, name), cases in tests.items():
        for table in _tables(cases):
            sharing[path, table].append(name)
    kept = set()
    for (path, name), cases in tests.items():
        for table, rows in _tables(cases).items():
            names = sharing[path, table]
            turns = min(TURNS, len(names))
            mine = {(table, row) for row in rows[names.index(name) % turns :: turns]}
            cases = [case for case in cases if mine & params(case)]
        kept.update(cover(cases))
    interpreted = {item for cases in tests.values() for item in cases}
    return [item for item in items if item not in interpreted or item in kept]


def _tables(cases: list[pytest.Item]) -> dict[str, list[str]]:
    """Rows of each long table, in order."""
    if "kernels" in cases[0].callspec.params:
        return {}
    rows = {
        name: list(dict.fromkeys(str(case.callspec.params[name]) for case in cases))
        for name in cases[0].callspec.params
    }
    return {name: values for name, values in rows.items() if len(values) >= TABLE}
