"""Runs the op tests on CPU kernels that were built with sanitizers: these must report nothing, and of each kind find a
fault that is planted then.

    python tests/sanitize.py                                          # all
    python tests/sanitize.py thread -n 2                              # one of them; the rest are options of pytest

A build is made in a copy of the tree, in build/sanitize/, so the kernels in use stay what they are. Needs GCC and its
sanitizers on Linux (Debian, Ubuntu: apt-get install g++). Exits with 1 if anything was reported, a test failed or a
fault was not found.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "csrc", "speculative_mamba", "tests")
KERNELS = "csrc/cpu/rms_norm.cpp"
ROWS = "tests/ops/test_rms_norm.py", "-k", "not (reference or shim or triton)"
THREADS = "tests/ops/test_window_contract.py", "-k", "threads and rms_norm and not (reference or shim or triton)"
# C++ kernels alone, and not what bounds the address space, which the shadow memory of a sanitizer fills.
TESTS = "not (reference or shim or triton or compiler or interpreter or boundary or does_not_give)"


class Fault(NamedTuple):
    """A piece of ``KERNELS``, what takes its place, what the report then says, and what pytest is given to run it."""

    piece: str
    planted: str
    report: str
    tests: tuple[str, ...]


class Sanitizer(NamedTuple):
    library: str
    options: dict[str, str]
    faults: tuple[Fault, ...]


SANITIZERS = {
    "address,undefined": Sanitizer(
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        (
            Fault("load_n(weight + k, count)", "load(weight + k)", "ERROR: AddressSanitizer", ROWS),
            Fault("work = p.rows", "work = INT64_MAX * p.rows", "signed integer overflow", ROWS),
        ),
    ),
    "thread": Sanitizer(
        "libtsan.so",
        # PyTorch and Python are not instrumented. A forked child may start threads: it has a pool of its own.
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:die_after_fork=0"},
        (
            Fault(
                "for (int64_t i = first;",
                "static int64_t rows; rows += last; for (int64_t i = first;",
                "data race",
                THREADS,
            ),
        ),
    ),
}


def main(arguments: list[str]) -> int:
    chosen = [name for name in SANITIZERS if name in arguments] or list(SANITIZERS)
    options = [argument for argument in arguments if argument not in SANITIZERS]
    for name in chosen:
        copy_tree(folder_of(name))
        build(name)
        code, reports = run_tests(name, ["tests/ops", "-k", TESTS, *options])
        if code or reports:
            print(f"{name}: pytest ended with {code}, reports: {reports or 'none'}")
            return 1
        for fault in SANITIZERS[name].faults:
            with planted(fault, folder_of(name)):
                build(name)
                _, reports = run_tests(name, [*options, "-n", "0", *fault.tests])  # one process: a report may end it
            if fault.report not in reports:
                print(f"{name}: '{fault.planted}' was planted, but not reported as {fault.report}: {reports or 'none'}")
                return 1
        print(f"{name}: no report, and {len(SANITIZERS[name].faults)} of as many planted faults found")
    return 0


def folder_of(name: str) -> Path:
    return ROOT / "build" / "sanitize" / name.replace(",", "-")


def copy_tree(folder: Path) -> None:
    """The sources with their times, so that what has not changed is not compiled again."""
    for name in COPIED:
        source, copy = ROOT / name, folder / name
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """The fault is in the copy."""
    file, source = folder / KERNELS, (ROOT / KERNELS).read_text()
    assert source.count(fault.piece) == 1, f"{KERNELS} has '{fault.piece}' {source.count(fault.piece)} times"
    file.write_text(source.replace(fault.piece, fault.planted))
    try:
        yield
    finally:
        file.write_text(source)


def build(name: str) -> None:
    environment = {**os.environ, "SPECULATIVE_MAMBA_CUDA": "off", "SPECULATIVE_MAMBA_SANITIZE": name}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder_of(name), env=environment, check=True)


def run_tests(name: str, options: list[str]) -> tuple[int, str]:
    """pytest's exit code, and what sanitizers reported in any process."""
    folder, sanitizer = folder_of(name), SANITIZERS[name]
    for report in folder.glob("report.*"):
        report.unlink()
    libraries = [found("g++", f"-print-file-name={file}") for file in (sanitizer.library, "libstdc++.so.6")]
    environment = {**os.environ, "LD_PRELOAD": ":".join(libraries), "SPECULATIVE_MAMBA_SANITIZE": name}
    environment |= {key: f"{value}:log_path={folder}/report" for key, value in sanitizer.options.items()}
    # Shadow memory has fixed places, which random ones of libraries may overlap.
    command = ["setarch", "--addr-no-randomize", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Undefined behaviour is reported on stderr, wherever a log shall be.
    with open(folder / "report.stderr", "w") as stderr:
        command += ["--capture=sys", "--reduced", *options]
        done = subprocess.run(command, cwd=folder, env=environment, stderr=stderr)
    reports = [report.read_text() for report in sorted(folder.glob("report.*"))]
    return done.returncode, "\n".join(
        report for report in reports if "Sanitizer" in report or "runtime error" in report
    )


def found(*command: str) -> str:
    return os.path.realpath(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
