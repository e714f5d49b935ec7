"""Few cases of a test that together have every value of every parameter: for what runs tests slowly."""

from collections import defaultdict

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reduced", action="store_true", help="not every combination of a test's parameters")
    parser.addoption("--full", action="store_true", help="more combinations on kernels of the GPU that are emulated")


@pytest.hookimpl(trylast=True)  # after -k, which may leave out what would have been chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("reduced"):
        return
    tests = defaultdict(list)
    for item in items:
        tests[item.path, item.originalname].append(item)
    kept = {item for cases in tests.values() for item in cover(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def cover(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few cases that together have every value of every parameter."""
    missing, chosen = set().union(*map(params, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & params(case))))
        missing -= params(chosen[-1])
    return chosen or cases[:1]


def params(item: pytest.Item) -> set[tuple[str, str]]:
    """Parameters and their values, as strings."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return {(name, _text(value)) for name, value in values.items()}


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # a number of too many digits
        return type(value).__name__
