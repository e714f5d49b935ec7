"""Builds the wheel speculative-mamba-cuda, the CUDA kernels alone, from the source tree: see ../../setup.py."""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "csrc").is_dir():
    sys.exit("speculative_mamba: the CUDA wheel is built from the source tree: python -m build --wheel wheels/cuda")
CMakeBuild = runpy.run_path(str(ROOT / "setup.py"))["CMakeBuild"]
version = runpy.run_path(str(ROOT / "speculative_mamba" / "__init__.py"))["__version__"]
setup(
    version=version,
    install_requires=[f"speculative-mamba=={version}"],
    ext_modules=[Extension("speculative_mamba_cuda._C_cuda", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
