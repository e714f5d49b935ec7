"""How many threads the CPU kernels use."""

import functools
import os
from pathlib import Path

import torch

# PyTorch's own choice, which nobody asked for; None where the environment or ``set_num_threads`` did.
_default = None if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys() else torch.get_num_threads()


def num_threads() -> int:
    """PyTorch's number of threads. While that is PyTorch's own choice, it is at most ``available_cpus()``: PyTorch does
    not look at a container's quota, and threads beyond it take turns."""
    threads = torch.get_num_threads()
    return min(threads, available_cpus()) if threads == _default else threads


def set_num_threads(threads: int) -> None:
    """As ``torch.set_num_threads``, also where PyTorch would have chosen that number."""
    global _default
    _default = None
    torch.set_num_threads(threads)


@functools.cache
def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and the whole part of its cgroup's quota; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The smallest quota, in CPUs, of the process's cgroup and those above it, version 1 or 2; None without one.

    groups: lines ``id:controllers:path``. A path that is not below ``mount``, as in a container, counts as its root.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        for root in {mount, mount / controllers, mount / "cpu"} if controllers else {mount, mount / "unified"}:
            group = root / path.lstrip("/")
            quotas += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    """Of one cgroup: microseconds of CPU time per period."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # there is none, or it is "max"
        return None
