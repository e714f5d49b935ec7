"""Which tests run on kernels of the GPU where there is none: they take seconds where those of the CPU take
milliseconds."""

from collections import defaultdict

import pytest
from reduced import cover, params

INTERPRETED, SHIM = "triton interpreted", "cuda on shim"
TABLE = 6  # a parameter of as many values is a table of cases, and tests of a file take turns with its rows
TURNS = 3  # at most, with --full


def without_most_emulated(items: list[pytest.Item], full: bool) -> list[pytest.Item]:
    """Of each test every value of every parameter, but not every combination; of a table that several tests of a file
    share a part each, together all of it. Tests against float64, with fixture ``kernels``, take all of a table.

    full: larger parts, and on the shim every combination."""
    tests = defaultdict(list)
    for item in items:
        for kernel in {value for _, value in params(item)} & ({INTERPRETED} if full else {INTERPRETED, SHIM}):
            tests[item.path, item.originalname, kernel].append(item)
    sharing = defaultdict(list)
    for (path, name, kernel), cases in tests.items():
        for table in _tables(cases):
            sharing[path, kernel, table].append(name)
    kept = set()
    for (path, name, kernel), cases in tests.items():
        for table, rows in _tables(cases).items():
            names = sharing[path, kernel, table]
            turns = min(TURNS, len(names)) if full else len(names)
            mine = {(table, row) for row in rows[names.index(name) % turns :: turns]}
            cases = [case for case in cases if mine & params(case)]
        kept.update(cover(cases))
    emulated = {item for cases in tests.values() for item in cases}
    return [item for item in items if item not in emulated or item in kept]


def _tables(cases: list[pytest.Item]) -> dict[str, list[str]]:
    """Rows of each long table, in order."""
    if "kernels" in cases[0].callspec.params:
        return {}
    rows = {
        name: list(dict.fromkeys(str(case.callspec.params[name]) for case in cases))
        for name in cases[0].callspec.params
    }
    return {name: values for name, values in rows.items() if len(values) >= TABLE}
