"""Tests every op on the GPU, then times it on the shapes of published models, in under eight minutes.

python -m benchmarks.gpu [--ops OP ...] [--quick] [--no-tests] [--minutes M] [--results FOLDER] [--json FILE]
python -m benchmarks.gpu --decode [--models NAME ...]
python -m benchmarks.gpu --predict

First come the tests that need a GPU: if one fails, no time is printed. Each case is then checked on the card, T tokens
at once against one by one bit for bit and rows against the reference, before it is timed. median_s is the time of one
call inside a CUDA graph of calls on different buffers, none of which is in the L2 cache when the graph starts.
gb_per_s counts the bytes an op must move once, share_of_bandwidth compares it with a copy on the same card. Ratios are
another's time over ours, interleaved in the same run: of PyTorch's operations, of one call per token, of Triton, and of
mamba_ssm where it is installed. Activations are bfloat16; dtype is that of the states or the weights. The window ops
start from the slot of the last window's last token, as after full acceptance.

With --decode whole runs are timed instead of ops, see ``benchmarks.gpu.decode``; rows go to FOLDER/<card>-decode.csv.

Rows go to FOLDER/<card>.csv. What is not timed is said on stderr; the exit code is then 1, and 2 without a GPU.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from speculative_mamba.ops.backend import BACKENDS

from ..report import Machine, Report, parser
from .cases import OPS, Case, cases
from .decode import MODELS, time_models
from .measure import COLUMNS, Failures, measure
from .predictions import print_predictions
from .timing import GraphTimer

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def device_tests_pass() -> bool:
    """Runs the tests that need a GPU; pytest's report goes to stderr."""
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", *parallel, "tests/ops"]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode == 0


def usable_backends() -> list[str]:
    """Those for GPUs; why one is off is said on stderr."""
    usable = []
    for name in ("cuda", "triton"):
        ok, reason = BACKENDS[name][1]()
        if ok:
            usable.append(name)
        else:
            print(f"benchmarks.gpu: backend '{name}' is off: {reason}", file=sys.stderr)
    return usable


def time_cases(
    chosen: Sequence[Case], backends: Sequence[str], device: torch.device, timer: GraphTimer, card: str, until: float
) -> tuple[Report, Failures]:
    """Rows of the cases that were begun before ``until``, as the monotonic clock counts."""
    bandwidth = timer.copy_bandwidth_gb_per_s()
    machine = Machine(f"{card}; copies {bandwidth:.0f} GB/s", f"backends {', '.join(backends)}", bandwidth)
    report, failures = Report(COLUMNS, machine), Failures()
    for done, case in enumerate(chosen):
        if time.monotonic() > until:
            print(f"benchmarks.gpu: out of time after {done} of {len(chosen)} cases", file=sys.stderr)
            break
        measure(case, backends, device, timer, report, failures)
    return report, failures


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser(__doc__.splitlines()[0])
    flags.prog = "python -m benchmarks.gpu"
    flags.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS, metavar="OP", help="only these: %(choices)s")
    flags.add_argument("--quick", action="store_true", help="only cases that differ from an op's first in one factor")
    flags.add_argument("--no-tests", dest="tests", action="store_false", help="do not run the device tests first")
    flags.add_argument("--minutes", type=float, default=7.5, help="begin no case after so many, tests included")
    flags.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the table, <card>.csv")
    flags.add_argument("--predict", action="store_true", help="print what is expected of an H100; needs no GPU")
    flags.add_argument("--decode", action="store_true", help="time whole runs instead of ops")
    flags.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME", help="%(choices)s")
    options = flags.parse_args(arguments)
    if options.predict:
        print_predictions()
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device, and nothing else is timed here", file=sys.stderr)
        return 2
    if options.decode:
        return _decode(options)
    until = time.monotonic() + 60 * options.minutes
    if options.tests and not device_tests_pass():
        print("benchmarks.gpu: the device tests fail, so nothing is timed", file=sys.stderr)
        return 1
    backends = usable_backends()
    if not backends:
        return 2
    chosen = [case for case in cases() if case.op in options.ops and (case.distance <= 1 or not options.quick)]
    device, card = torch.device("cuda"), torch.cuda.get_device_name()
    report, failures = time_cases(chosen, backends, device, GraphTimer(), card, until)
    report.write_csv(options.results / f"{card.lower().replace(' ', '-')}.csv")
    report.write(options.json)
    return 1 if failures.count else 0


def _decode(options: argparse.Namespace) -> int:
    card, bandwidth = torch.cuda.get_device_name(), GraphTimer().copy_bandwidth_gb_per_s()
    report, failures = time_models(options.models, torch.device("cuda"), card, bandwidth)
    for failure in failures:
        print(f"benchmarks.gpu: {failure}", file=sys.stderr)
    report.write_csv(options.results / f"{card.lower().replace(' ', '-')}-decode.csv")
    report.write(options.json)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
