"""Which of a test's cases run: of three parameters and more, cases that together have every two values; with --reduced,
for what runs tests slowly, every value; with --full all."""

import heapq
from collections import defaultdict
from itertools import combinations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reduced", action="store_true", help="not every combination of a test's parameters")
    parser.addoption("--full", action="store_true", help="all combinations, of emulated kernels of GPUs more than else")


@pytest.hookimpl(trylast=True)  # after -k, which may leave out what would have been chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("full"):
        return
    choose = cover if config.getoption("reduced") else cover_pairs
    tests = defaultdict(list)
    for item in items:
        tests[item.path, item.originalname].append(item)
    kept = {item for cases in tests.values() for item in choose(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def cover(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few cases that together have every value of every parameter."""
    values = list(map(params, cases))
    missing, chosen = set().union(*values), []
    while missing:
        chosen.append(max(range(len(cases)), key=lambda index: len(missing & values[index])))
        missing -= values[chosen[-1]]
    return [cases[index] for index in chosen] or cases[:1]


def cover_pairs(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few cases that together have every value of a parameter with every value of another, as far as any has."""
    parameters = list(map(axes, cases))
    varied = [name for name in parameters[0] if any(other[name] != parameters[0][name] for other in parameters)]
    if len(varied) < 3:
        return cases
    pairs = [{frozenset(pair) for pair in combinations(((n, other[n]) for n in varied), 2)} for other in parameters]
    # What a case adds only becomes less, so the first that adds as much as was thought adds most.
    missing, kept = set().union(*pairs), []
    queue = [(-len(of_case), index) for index, of_case in enumerate(pairs)]
    heapq.heapify(queue)
    while missing:
        thought, index = heapq.heappop(queue)
        adds = len(missing & pairs[index])
        if adds == -thought:
            kept.append(index)
            missing -= pairs[index]
        elif adds:
            heapq.heappush(queue, (-adds, index))
    return [cases[index] for index in sorted(kept)]


def axes(item: pytest.Item) -> dict[str, tuple[str, ...]]:
    """What varies for itself: parameters that one mark names have their values together."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    together = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].replace(",", " ").split() if isinstance(mark.args[0], str) else list(mark.args[0])
        together |= {name: names for name in names}
    return {
        " ".join(together.get(name, [name])): tuple(_text(values[each]) for each in together.get(name, [name]))
        for name in values
    }


def params(item: pytest.Item) -> set[tuple[str, str]]:
    """Parameters and their values, as strings."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return {(name, _text(value)) for name, value in values.items()}


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # a number of too many digits
        return type(value).__name__
