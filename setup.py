"""Builds speculative_mamba._C, and _C_cuda where there is nvcc, with CMake and Ninja. Torch is not needed.

SPECULATIVE_MAMBA_CUDA: auto (the default: build the CUDA kernels if nvcc is found; if they fail, say so and go on), on
(nvcc must be found and succeed) or off. SPECULATIVE_MAMBA_CUDA_ARCHS: compute capabilities such as "80;90"; by default
the first of every generation from Ampere on that nvcc lists, whose code runs on the rest of its generation, and PTX of
the last for those to come. SPECULATIVE_MAMBA_SANITIZE: address,undefined or thread, for the CPU kernels; Python then
needs the sanitizer's library in LD_PRELOAD, as tests/sanitize.py gives it.

Object files stay in build/, so that a second build compiles what has changed. Whatever goes wrong, the last line says
what is needed.
"""

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
OLDEST = 80
SETUPTOOLS = 77  # as in pyproject.toml: older ones do not understand it
CHOICES = {  # the first is the default
    "SPECULATIVE_MAMBA_CUDA": ("auto", "on", "off"),
    "SPECULATIVE_MAMBA_SANITIZE": ("", "address,undefined", "thread"),
}
# CMake reads these once, when it configures a build folder for the first time.
READ_ONCE = re.compile(r"CMAKE_\w+|CC|CXX|CUDAHOSTCXX|\w+FLAGS")
GET_COMPILER = "Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install"
GET_HEADERS = "Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel"
CAUSES = (
    ("No space left on device|Disk quota exceeded", "the disk is full; the build needs room in {build} and in {tmp}"),
    ("Killed|[Oo]ut of memory|annot allocate memory", "memory ran out; compile one file at a time with MAX_JOBS=1"),
)


def chosen(variable: str) -> str:
    """What an environment variable chooses."""
    choices = CHOICES[variable]
    value = os.environ.get(variable, choices[0])
    if value not in choices:
        sys.exit(f"{variable} must be {' or '.join(filter(None, choices))}, got '{value}'")
    return value


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which(Path(home) / "bin" / "nvcc") if home else None) or shutil.which("nvcc")


def find_compiler() -> list[str]:
    """The C++ compiler that CMake will take, with its arguments."""
    asked = os.environ.get("CXX")
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    command = shlex.split(asked) if asked else [found] if found else []
    if not command:
        raise CompileError(f"no C++ compiler found; install one ({GET_COMPILER}) or set CXX")
    if shutil.which(command[0]) is None:
        raise CompileError(f"CXX is '{asked}', which is not to be found; unset it or name a C++17 compiler")
    return command


def find_ninja() -> str | None:
    return shutil.which("ninja") or shutil.which("ninja-build")


def check_tools() -> None:
    """Raises CompileError for all that CMake would tell in many lines, or after a long time."""
    found = {"cmake": shutil.which("cmake"), "ninja": find_ninja(), "pybind11": importlib.util.find_spec("pybind11")}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        names = " ".join(missing)
        raise CompileError(
            f"{names} not found; pip brings what is missing without --no-build-isolation, else: pip install {names}"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise CompileError(f"Python's headers are missing ({header}); install them ({GET_HEADERS})")
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <optional>\nstatic_assert(__cplusplus >= 201703L);\nint main() {}\n")
        command = [*compiler, "-std=c++17", "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        said = cause(result.stdout + result.stderr)
        raise CompileError(f"{shlex.join(compiler)} cannot compile C++17: {said}; install a newer one ({GET_COMPILER})")


def cause(output: str) -> str:
    """One line for why a tool has failed."""
    for pattern, text in CAUSES:
        if re.search(pattern, output):
            return text.format(build=BUILD, tmp=tempfile.gettempdir())
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line, following in itertools.pairwise([*lines, ""]):
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return f"{line} {following}" if line.endswith(":") else line
    return lines[-1] if lines else "it said nothing"


def run(command: list[str]) -> None:
    """Runs a command and shows what it says; raises CompileError with the cause."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as tool:
        said = []
        for line in tool.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if tool.returncode:
        raise CompileError(f"{Path(command[0]).name} failed: {cause(''.join(said))}")


def architectures(nvcc: str) -> list[int]:
    """Those asked for, or the first of every generation."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", listing)})
    asked = re.findall(r"[^;,\s]+", os.environ.get("SPECULATIVE_MAMBA_CUDA_ARCHS", ""))
    for name in asked:
        if name not in map(str, known):
            raise CompileError(
                f"SPECULATIVE_MAMBA_CUDA_ARCHS: this nvcc knows no '{name}'; choose from: {'; '.join(map(str, known))}"
            )
    generations = {number // 10: number for number in reversed(known) if number >= OLDEST}
    return sorted(map(int, asked)) or sorted(generations.values())


def cuda_options(nvcc: str) -> list[str]:
    numbers = architectures(nvcc)
    # Code of every architecture, and of the last one PTX too.
    targets = [f"{number}-real" for number in numbers[:-1]] + [str(numbers[-1])]
    names = " ".join(map(str, numbers)) + "+PTX"
    return [
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(targets)}",
        f"-DSM_CUDA_ARCHITECTURES={names}",
    ]


def configured(name: str, source: Path, output: Path, options: list[str]) -> Path:
    """The extension's build folder, emptied first if it was configured for anything else than what is there now."""
    folder = BUILD / name
    compiler = os.path.realpath(shutil.which(find_compiler()[0]))
    environment = [f"{key}={value}" for key, value in sorted(os.environ.items()) if READ_ONCE.fullmatch(key)]
    wanted = "\n".join(map(str, [source, folder, sys.base_prefix, compiler, *environment, *options]))
    note = folder / "configured_for"
    if not note.exists() or note.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    run([
        "cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder),
        # What may differ from the build before: pip's build environment is a new one every time.
        f"-DCMAKE_MAKE_PROGRAM={find_ninja()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        f"-Dpybind11_DIR={pybind11_folder()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    ])  # fmt: skip
    note.write_text(wanted)
    return folder


def pybind11_folder() -> str:
    """pybind11's CMake package, in a place that outlives pip's build environments, so that nothing is compiled anew."""
    import pybind11

    package, cmake = Path(pybind11.__file__).parent, Path(pybind11.get_cmake_dir())
    if not cmake.is_relative_to(package):
        return str(cmake)
    kept = BUILD / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            shutil.copytree(package, Path(folder, "pybind11")).rename(kept)
    return str(kept / cmake.relative_to(package))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name.endswith("_C_cuda")
        try:
            check_tools()
            options = [f"-DSM_SANITIZE={sanitize}"] if sanitize else []
            if is_cuda:
                nvcc = find_nvcc()
                if nvcc is None:
                    raise CompileError("no nvcc found; put it on the PATH or set CUDA_HOME")
                options = cuda_options(nvcc)
            self._build(ext, ROOT / "csrc" / "cuda" if is_cuda else ROOT, options)
        except (CompileError, subprocess.CalledProcessError, OSError) as error:
            line = f"speculative_mamba: the {'CUDA' if is_cuda else 'CPU'} kernels were not built: {error}"
            if not ext.optional:
                sys.exit(line)
            raise CompileError(f"{line}; the CPU kernels are not affected") from None

    def _build(self, ext: Extension, source: Path, options: list[str]) -> None:
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not re.fullmatch("0*[1-9][0-9]*", jobs):
            raise CompileError(f"MAX_JOBS must be a number of files to compile at a time, got '{jobs}'")
        output = Path.cwd() / self.get_ext_fullpath(ext.name)
        folder = configured(ext.name, source, output.parent, options)
        run(["cmake", "--build", str(folder), "--parallel", jobs])


if int(setuptools.__version__.partition(".")[0]) < SETUPTOOLS:
    sys.exit(
        f"speculative_mamba: setuptools {setuptools.__version__} is too old; pip install 'setuptools>={SETUPTOOLS}'"
    )
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("speculative_mamba: this Python is free-threaded, for which the kernels are not made; take one with a GIL")
mode, sanitize = map(chosen, CHOICES)
if __name__ == "__main__":  # wheels/cuda/setup.py takes what is above
    extensions = [Extension("speculative_mamba._C", sources=[])]
    if mode == "on" or (mode == "auto" and find_nvcc()):
        extensions.append(Extension("speculative_mamba._C_cuda", sources=[], optional=mode == "auto"))
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
