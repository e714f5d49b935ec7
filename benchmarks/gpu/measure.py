"""Gate, then time: the rows of one case."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..report import Report, number, share
from .cases import Case
from .work import WindowWork, Work

Call = Callable[[], object]
Timer = Callable[[dict[str, list[Call]]], dict[str, float]]

# A graph has as many calls as fit into so many bytes, but no fewer and no more than this.
_BYTES, _FEWEST, _MOST = 2**30, 8, 64
_ONE_BY_ONE = "one by one"
RATIOS = {"ratio": "torch", "ratio_one_by_one": _ONE_BY_ONE, "ratio_triton": "triton", "ratio_mamba_ssm": "mamba_ssm"}


def microseconds(value: float) -> str:
    return f"{value * 1e6:.2f} us"


COLUMNS: dict[str, Callable[[object], str]] = {
    "op": str, "backend": str, "shape": str, "dtype": str, "mode": str, "rows": str, "tokens": str, "batch": str,
    "median_s": microseconds, "gb_per_s": number, "share_of_bandwidth": share, **dict.fromkeys(RATIOS, number),
}  # fmt: skip


class Failures:
    """What was not timed, and why; each is said once, on stderr."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, what: str, error: BaseException) -> None:
        self.count += 1
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"benchmarks.gpu: {what}: not timed: {reason}", file=sys.stderr, flush=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # an error that lasts ends the run


def measure(
    case: Case, backends: Sequence[str], device: torch.device, timer: Timer, report: Report, failures: Failures
) -> None:
    """Adds a row for each backend whose result is right. One that is wrong, or does not run, prints no time."""
    try:
        right = [backend for backend in backends if _is_right(case, backend, device, failures)]
        works = [case.work(device)]
        copies = min(_MOST, max(2, _BYTES // works[0].moved))
        works += [case.work(device) for _ in range(copies - 1)]
        times = timer(_contenders(works, right)) if right else {}
    except Exception as error:
        failures.add(str(case), error)
        return
    for backend in right:
        report.add(**_row(case, backend, works[0].moved, times, report.bandwidth))


def _is_right(case: Case, backend: str, device: torch.device, failures: Failures) -> bool:
    try:
        case.work(device).check(backend)
    except Exception as error:
        failures.add(f"{case}, {backend}", error)
        return False
    return True


def _contenders(works: list[Work], backends: list[str]) -> dict[str, list[Call]]:
    """Calls on all sets in turn, fewer of what takes a launch or more for every token."""
    calls = max(len(works), _FEWEST)
    turns = [works[i % len(works)] for i in range(calls)]
    contenders = {backend: [partial(work.run, backend) for work in turns] for backend in backends}
    if isinstance(works[0], WindowWork):
        turns = turns[: max(2, calls // works[0].tokens)]
        for backend in backends if works[0].tokens > 1 else ():
            contenders[f"{backend} {_ONE_BY_ONE}"] = [partial(work.one_by_one, backend) for work in turns]
    baselines = [work.baselines() for work in turns]
    return contenders | {name: [others[name] for others in baselines] for name in baselines[0]}


def _row(case: Case, backend: str, moved: int, times: dict[str, float], bandwidth: float) -> dict[str, object]:
    seconds = times[backend]
    speed = moved / seconds / 1e9
    row = {
        "op": case.op, "backend": backend, "shape": case.shape, "dtype": case.dtype_name, "mode": case.mode,
        **case.sizes, "median_s": seconds, "gb_per_s": speed, "share_of_bandwidth": speed / bandwidth,
        "baseline": "torch",
    }  # fmt: skip
    for key, baseline in RATIOS.items():
        other = times.get(f"{backend} {baseline}" if baseline == _ONE_BY_ONE else baseline)
        row[key] = None if other is None or baseline == backend else other / seconds
    return row
