"""One line per case, with the machine and the commit above, and the same rows as JSON."""

import argparse
import csv
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from speculative_mamba.ops import backend as backends
from speculative_mamba.ops.threads import num_threads
from speculative_mamba.testing.timing import read_bandwidth_gb_per_s


@dataclass(frozen=True)
class Machine:
    """What is measured on: the lines above the table. bandwidth: 10⁹ bytes per second."""

    name: str
    kernels: str
    bandwidth: float


def progress(doing: str) -> None:
    """A line on stderr: what takes time now."""
    print(f"… {doing}", file=sys.stderr, flush=True)


def this_processor() -> Machine:
    progress("measuring the bandwidth of memory")
    bandwidth = read_bandwidth_gb_per_s()
    module, reason = backends.extension()
    name = f"{_processor()}, {num_threads()} threads; reads {bandwidth:.1f} GB/s at best"
    return Machine(name, reason if module else f"reference only: {reason}", bandwidth)


class Report:
    """Prints rows as they come; ``columns`` maps a row's key to a format for its cell."""

    def __init__(self, columns: dict[str, Callable[[object], str]], machine: Machine | None = None) -> None:
        machine = machine or this_processor()
        self._columns = columns
        self.rows: list[dict] = []
        self.bandwidth = machine.bandwidth
        print(f"machine: {machine.name}")
        print(f"commit {_commit()}, torch {torch.__version__}, {machine.kernels}")
        print("  ".join(f"{name:>{self._width(name)}}" for name in columns), flush=True)

    @staticmethod
    def _width(name: str) -> int:
        return max(len(name), {"op": 22, "case": 22, "shape": 14}.get(name, 11))

    def add(self, **row: object) -> None:
        self.rows.append(row)
        cells = {name: cell(row[name]) if row.get(name) is not None else "-" for name, cell in self._columns.items()}
        print("  ".join(f"{text:>{self._width(name)}}" for name, text in cells.items()), flush=True)

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.write_text(json.dumps(self.rows, indent=1) + "\n")
            print(f"wrote {len(self.rows)} rows to {path}")

    def write_csv(self, path: Path) -> None:
        """A line for each row, empty where it lacks a column that another has."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            lines = csv.DictWriter(file, list(dict.fromkeys(key for row in self.rows for key in row)))
            lines.writeheader()
            lines.writerows(self.rows)
        print(f"wrote {len(self.rows)} rows to {path}")


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as a list of objects")
    return made


def seconds(value: float) -> str:
    return f"{value * 1e3:.3f} ms"


def number(value: float) -> str:
    return f"{value:.2f}"


def share(value: float) -> str:
    return f"{value * 100:.0f} %"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
