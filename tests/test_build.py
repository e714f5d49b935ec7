"""What setup.py builds, and what it says: with stand-ins for cmake, compiler and nvcc, so that nothing is compiled."""

import importlib
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import speculative_mamba

ROOT = Path(__file__).parents[1]
CMAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$@" in *csrc/cuda*|*_C_cuda*) exit ${CUDA_FAILS:-0};; esac
case "$@" in --build*) printf '%b' "$SAYS"; [ -z "$SAYS" ];; esac
"""
COMPILER = """#!/bin/sh
printf '%b' "$COMPILER_SAYS" >&2
[ -z "$COMPILER_SAYS" ]
"""
NVCC = """#!/bin/sh
for number in 75 80 86 90 100 103 120 121; do echo compute_$number; done
"""


class Build:
    """Runs setup.py's build_ext in a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        self.bin.mkdir()
        shutil.copy(ROOT / "setup.py", folder)
        (folder / "speculative_mamba").mkdir()
        self.tool("cmake", CMAKE)
        self.tool("ninja", "#!/bin/sh\n")
        self.tool("c++", COMPILER)

    def tool(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def __call__(self, **environment: str) -> subprocess.CompletedProcess:
        own = re.compile(r".*CUDA.*|.*SANITIZE|.*FLAGS|CMAKE_.*|CC|CXX|MAX_JOBS")
        clean = {name: value for name, value in os.environ.items() if not own.fullmatch(name)}
        clean |= {"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls), **environment}
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        return subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True, timeout=90)

    def refusal(self, **environment: str) -> str:
        """The last line of a build that must fail."""
        result = self(**environment)
        assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
        return result.stderr.splitlines()[-1]

    def configured(self) -> list[str]:
        """The calls of cmake that configure."""
        return [line for line in self.calls.read_text().splitlines() if line.startswith("-G")]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    pytest.importorskip("pybind11")
    return Build(tmp_path)


@pytest.fixture
def script() -> dict[str, Any]:
    """The names of setup.py, of which nothing is run."""
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.skipif(any(map(os.path.exists, ("/usr/bin/nvcc", "/bin/nvcc"))), reason="nvcc is always found here")
class TestWithoutNvcc:
    def test_auto_builds_the_cpu_kernels(self, build: Build) -> None:
        result = build()
        assert result.returncode == 0, result.stderr
        assert len(build.configured()) == 1 and "csrc/cuda" not in build.configured()[0]

    def test_on_says_what_is_missing(self, build: Build) -> None:
        result = build(SPECULATIVE_MAMBA_CUDA="on")
        assert result.returncode != 0
        line = "speculative_mamba: the CUDA kernels were not built: no nvcc found; put it on the PATH or set CUDA_HOME"
        assert result.stderr.splitlines()[-1] == line


def test_the_toolkit_decides_the_architectures(build: Build) -> None:
    build.tool("nvcc", NVCC)
    assert build().returncode == 0
    _, cuda = build.configured()
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;100-real;120 " in cuda
    assert cuda.endswith("-DSM_CUDA_ARCHITECTURES=80 90 100 120+PTX")


def test_architectures_can_be_chosen(build: Build) -> None:
    build.tool("nvcc", NVCC)
    assert build(SPECULATIVE_MAMBA_CUDA_ARCHS="90; 86").returncode == 0
    assert "-DCMAKE_CUDA_ARCHITECTURES=86-real;90 " in build.configured()[1]


def test_an_unknown_architecture_is_refused(build: Build) -> None:
    build.tool("nvcc", NVCC)
    result = build(SPECULATIVE_MAMBA_CUDA="on", SPECULATIVE_MAMBA_CUDA_ARCHS="sm_90")
    assert result.returncode != 0
    assert "this nvcc knows no 'sm_90'; choose from: 75; 80; 86; 90" in result.stderr.splitlines()[-1]


def test_off_never_looks(build: Build) -> None:
    build.tool("nvcc", NVCC)
    assert build(SPECULATIVE_MAMBA_CUDA="off").returncode == 0
    assert len(build.configured()) == 1


def test_in_auto_a_failure_leaves_the_cpu_kernels(build: Build) -> None:
    build.tool("nvcc", NVCC)
    result = build(CUDA_FAILS="1")
    assert result.returncode == 0
    assert "the CUDA kernels were not built: cmake failed: " in result.stderr
    assert "the CPU kernels are not affected" in result.stderr
    result = build(CUDA_FAILS="1", SPECULATIVE_MAMBA_CUDA="on")
    assert result.returncode != 0 and "the CUDA kernels were not built" in result.stderr.splitlines()[-1]


def test_an_unknown_mode_is_refused(build: Build) -> None:
    line = build.refusal(SPECULATIVE_MAMBA_CUDA="yes")
    assert line == "SPECULATIVE_MAMBA_CUDA must be auto or on or off, got 'yes'"
    line = build.refusal(SPECULATIVE_MAMBA_SANITIZE="memory")
    assert line == "SPECULATIVE_MAMBA_SANITIZE must be address,undefined or thread, got 'memory'"
    assert build.refusal(MAX_JOBS="many").endswith(
        "MAX_JOBS must be a number of files to compile at a time, got 'many'"
    )


class TestTheLastLineSaysWhatIsNeeded:
    def test_in_a_build(self, build: Build) -> None:
        line = build.refusal(SAYS="[1/9] Building\\nfatal error: x.o: No space left on device\\nninja: stopped\\n")
        assert line.startswith("speculative_mamba: the CPU kernels were not built: cmake failed: the disk is full; ")
        assert "needs room in " + str(build.folder / "build") in line
        (build.bin / "c++").unlink()
        line = build.refusal(PATH=str(build.bin))
        assert "no C++ compiler found; install one (Debian, Ubuntu: apt-get install g++;" in line

    def test_an_old_setuptools(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("setuptools.__version__", "65.5.0")
        with pytest.raises(SystemExit, match=r"setuptools 65\.5\.0 is too old; pip install 'setuptools>=77'"):
            runpy.run_path(str(ROOT / "setup.py"))

    def test_a_free_threaded_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sysconfig.get_config_var", lambda name: name == "Py_GIL_DISABLED")
        with pytest.raises(
            SystemExit, match=r"^speculative_mamba: this Python is free-threaded, [^\n]*; take one with"
        ):
            runpy.run_path(str(ROOT / "setup.py"))

    @pytest.mark.parametrize(
        ("said", "cause"),
        [
            ("cp: x: Disk quota exceeded", "the disk is full; the build needs room in "),
            ("c++: fatal error: Killed signal terminated program cc1plus\n[2/9]", "memory ran out; .* MAX_JOBS=1"),
            ("CMake Error at CMakeLists.txt:1 (x):\n\n  Too old.\n\nmore", r"CMake Error .*\(x\): Too old\.$"),
            ("FAILED: a.o\na.cpp:3:1: error: no such thing\nninja: stopped", "a.cpp:3:1: error: no such thing$"),
            ("odd", "odd$"),
            ("", "it said nothing$"),
        ],
    )
    def test_causes(self, script: dict[str, Any], said: str, cause: str) -> None:
        assert re.match(cause, script["cause"](said))

    @pytest.mark.parametrize(
        ("change", "needed"),
        [
            (
                "cmake",
                "^cmake not found; pip brings what is missing without --no-build-isolation, else: pip install cmake",
            ),
            ("ninja", "^ninja not found"),
            ("pybind11", "^pybind11 not found"),
            ("CXX", "^CXX is 'g[+][+]-nowhere -m64', which is not to be found; unset it"),
            ("C++17", r"^c[+][+] cannot compile C[+][+]17: c[+][+]: error: .*; install a newer one \(Debian"),
            ("Python.h", r"^Python's headers are missing \(.*Python.h\); install them \(.*python3-dev"),
        ],
    )
    def test_tools(
        self, build: Build, script: dict[str, Any], change: str, needed: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(build.bin))
        monkeypatch.delenv("CXX", raising=False)
        if change in ("cmake", "ninja"):
            (build.bin / change).unlink()
        if change == "pybind11":
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        if change == "CXX":
            monkeypatch.setenv("CXX", "g++-nowhere -m64")
        if change == "C++17":
            monkeypatch.setenv("COMPILER_SAYS", "c++: error: unrecognized option '-std=c++17'")
        if change == "Python.h":
            monkeypatch.setattr("sysconfig.get_path", lambda name: str(build.folder))
        with pytest.raises(script["CompileError"], match=needed):
            script["check_tools"]()


def test_a_second_build_goes_on_from_the_first_unless_that_was_for_something_else(build: Build) -> None:
    """A build that goes on takes the tools of its own environment: pip makes a new one every time."""

    def kept(**environment: str) -> bool:
        (folder,) = (build.folder / "build").glob("*/speculative_mamba._C")
        (folder / "object.o").touch()
        assert build(**environment).returncode == 0
        return (folder / "object.o").exists()

    assert build().returncode == 0
    (build.folder / "another").mkdir()
    for name in ("cmake", "ninja"):
        shutil.move(build.bin / name, build.folder / "another")
    path = f"{build.folder / 'another'}:{build.bin}:/usr/bin:/bin"
    assert kept(PATH=path)
    first, second = build.configured()
    assert f"-DCMAKE_MAKE_PROGRAM={build.folder / 'another' / 'ninja'}" in second.split()
    pybind11 = [word for word in second.split() if word.startswith("-Dpybind11_DIR")]
    assert set(pybind11) < set(first.split()) and f"={build.folder}/build/" in pybind11[0]

    assert not kept(PATH=path, CXXFLAGS="-g"), "CMake reads the environment when it configures first"
    next((build.folder / "build").glob("*/*_C/configured_for")).unlink()
    assert not kept(PATH=path, CXXFLAGS="-g"), "the first was not configured to its end"
    build.folder = build.folder.rename(build.folder.with_name("moved"))
    build.bin, build.calls = build.folder / "another", build.folder / "calls"
    shutil.move(build.folder / "bin" / "c++", build.bin)
    assert not kept(CXXFLAGS="-g"), "a cache names the folder that it is in"


def claimed_pythons() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert f'requires-python = ">={versions[0]}"' in text
    return versions


def test_the_version_is_in_one_place_and_repeated_by_the_citation() -> None:
    """CHANGELOG has a date for each release."""
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"\nversion: {speculative_mamba.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert all(re.fullmatch(r"Unreleased|\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings)


def pins() -> list[tuple[Requirement, SpecifierSet]]:
    """The constraints, each with the Requires-Python of its release, which is its comment."""
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    parts = [line.partition("  # ") for line in lines]
    assert all(pythons for _, _, pythons in parts), "every line ends in its Requires-Python, or in any"
    return [(Requirement(pin), SpecifierSet(pythons.replace("any", ""))) for pin, _, pythons in parts]


@pytest.mark.parametrize("version", claimed_pythons())
def test_every_python_that_is_claimed_has_one_pin_of_each_package(version: str) -> None:
    here = [
        (pin, pythons) for pin, pythons in pins() if not pin.marker or pin.marker.evaluate({"python_version": version})
    ]
    assert sorted(pin.name for pin, _ in here) == sorted({pin.name for pin, _ in pins()})
    for pin, pythons in here:
        assert pythons.contains(f"{version}.0"), f"{pin} is not for Python {version}"


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    """Those of extras too, but for what only the site and the embedded pair's makers install.

    Catches: a dependency without a pin, and a bound that was raised above its pin.
    """
    text = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.scripts]")[0].split("\ndependencies = ")[1]
    wanted = [line for line in text.splitlines() if not line.startswith(("docs", "embedded-pair"))]
    named = {canonicalize_name(pin.name): pin for pin, _ in pins()}
    for requirement in map(Requirement, re.findall(r'"([a-z][^"]*)"', "\n".join(wanted))):
        name = canonicalize_name(requirement.name)
        if name in ("speculative-mamba", "llama-cpp-python"):  # this package; compiled by whoever wants the benchmark
            continue
        assert name in named, f"{requirement} has no pin"
        versions = [next(iter(pin.specifier)).version for pin, _ in pins() if canonicalize_name(pin.name) == name]
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_constraints_tell_the_truth_about_what_is_installed() -> None:
    seen = [
        (pin, pythons, found.metadata["Requires-Python"] or "")
        for pin, pythons in pins()
        for found in importlib.metadata.distributions(name=pin.name)
        if pin.specifier.contains(found.version)
    ]
    assert seen, "constraints.txt pins nothing that is installed"
    for pin, pythons, truth in seen:
        assert pythons == SpecifierSet(truth), f"{pin} is for Python {truth}"


@pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("SPECULATIVE_MAMBA_CUDA") == "off", reason="needs nvcc"
)
def test_where_there_is_nvcc_the_cuda_kernels_are_built() -> None:
    """The module needs no GPU to be loaded; without one it says why its kernels cannot run.

    Catches: a broken CMakeLists.txt.
    """
    module = importlib.import_module("speculative_mamba._C_cuda")
    assert module.architectures.endswith("+PTX") and callable(module.selective_scan_verify)
    assert bool(module.problem()) is not torch.cuda.is_available()
