"""Builds speculative_mamba._C, and _C_cuda where there is nvcc, with CMake and Ninja. Torch is not needed.

SPECULATIVE_MAMBA_CUDA: auto (the default: build the CUDA kernels if nvcc is found; if they fail, say so and go on), on
(nvcc must be found and succeed) or off. SPECULATIVE_MAMBA_CUDA_ARCHS: compute capabilities such as "80;90"; by default
the first of every generation from Ampere on that nvcc lists, whose code runs on the rest of its generation, and PTX of
the last for those to come.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
OLDEST = 80
MODES = ("auto", "on", "off")


def cuda_mode() -> str:
    mode = os.environ.get("SPECULATIVE_MAMBA_CUDA", "auto")
    if mode not in MODES:
        sys.exit(f"SPECULATIVE_MAMBA_CUDA must be one of {', '.join(MODES)}, got '{mode}'")
    return mode


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which(Path(home) / "bin" / "nvcc") if home else None) or shutil.which("nvcc")


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


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not ext.name.endswith("_C_cuda"):
            return self._build(ext, ROOT)
        try:
            nvcc = find_nvcc()
            if nvcc is None:
                raise CompileError("no nvcc found; put it on the PATH or set CUDA_HOME")
            numbers = architectures(nvcc)
            # Code of every architecture, and of the last one PTX too.
            targets = [f"{number}-real" for number in numbers[:-1]] + [str(numbers[-1])]
            names = " ".join(map(str, numbers)) + "+PTX"
            options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(targets)}"]
            self._build(ext, ROOT / "csrc" / "cuda", *options, f"-DSM_CUDA_ARCHITECTURES={names}")
        except (CompileError, subprocess.CalledProcessError, OSError) as error:
            reason = error
            if isinstance(error, subprocess.CalledProcessError):
                reason = f"{Path(error.cmd[0]).name} failed; its messages are above (pip shows them with -v)"
            line = f"speculative_mamba: the CUDA kernels were not built: {reason}"
            if not ext.optional:
                sys.exit(line)
            raise CompileError(f"{line}; the CPU kernels are not affected") from None

    def _build(self, ext: Extension, source: Path, *options: str) -> None:
        import pybind11

        output = Path.cwd() / self.get_ext_fullpath(ext.name)
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-G", "Ninja", "-S", str(source), "-B", str(build),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


mode = cuda_mode()
extensions = [Extension("speculative_mamba._C", sources=[])]
if mode == "on" or (mode == "auto" and find_nvcc()):
    extensions.append(Extension("speculative_mamba._C_cuda", sources=[], optional=mode == "auto"))
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
