"""The rules of the source tree: who imports whom, one op one name, short files, no optional library needed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from speculative_mamba import ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "speculative_mamba"
# A package imports only itself and what stands before it; modules of the top level stand last.
ORDER = ("ops", "layers", "models", "decode", "serve")
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
OPS = sorted(path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py"))


def component(parts: tuple[str, ...]) -> str:
    """The part of the package that a dotted name lies in: ops, layers, …, testing, or "top"."""
    return parts[1] if len(parts) > 1 and (*ORDER, "testing").count(parts[1]) else "top"


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Dotted names of the package that a module imports, anywhere in it."""
    package = ("speculative_mamba", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            names = [(*base, *(node.module or "").split("."), alias.name) for alias in node.names]
            names = [tuple(part for part in name if part) for name in names]
        else:
            continue
        yield from (name for name in names if name[0] == "speculative_mamba")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    mine = component(("speculative_mamba", *path.relative_to(PACKAGE).parts))
    allowed = {*ORDER, "testing", "top"} if mine == "testing" else {*ORDER, "top"}
    if mine in ORDER:
        allowed = set(ORDER[: ORDER.index(mine) + 1])
    wrong = [".".join(name) for name in imported(path) if component(name) not in allowed]
    assert not wrong, f"{mine} must not import {wrong}"


def test_only_the_bindings_know_the_extension() -> None:
    knowing = {str(path.relative_to(PACKAGE)) for path in MODULES if re.search(r"\b_C\b", path.read_text("utf-8"))}
    assert knowing == {"ops/backend.py", *(f"ops/{op}/native.py" for op in OPS)} & knowing
    assert "ops/backend.py" in knowing


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_everywhere(op: str) -> None:
    """On every backend, which take the op's one argument object."""
    files = [f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu", f"tests/ops/test_{op}.py"]
    backends = [f"speculative_mamba/ops/{op}/{name}.py" for name in ("reference", "native", "triton")]
    missing = [name for name in [*files, *backends] if not (ROOT / name).is_file()]
    assert not missing
    args = "".join(part.capitalize() for part in op.split("_")) + "Args"
    for name in backends:
        assert f"def {op}(args: {args}) ->" in (ROOT / name).read_text("utf-8"), name
    assert callable(getattr(ops, op))


def test_every_op_is_public() -> None:
    """sample_tokens is speculative_accept without a drafted token."""
    assert sorted(ops.__all__) == sorted([*OPS, "sample_tokens"])


def test_files_are_short() -> None:
    folders = ("speculative_mamba", "csrc", "tests", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files = [path for path in [*files, ROOT / "setup.py"] if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length >= 500} == {}


def documented(function: ast.FunctionDef) -> list[str]:
    """What stands before a colon in the Args of its docstring."""
    section = re.search(r"^( *)Args:\n((?:\1 .*\n|\n)*)", ast.get_docstring(function) or "", re.MULTILINE)
    return re.findall(r"^ {4}(\S[^:]*):", section[2], re.MULTILINE) if section else []


def test_arguments_that_docstrings_describe_exist() -> None:
    """One by one: as the reference of the site, which is strict, reads them."""
    seen = 0
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = documented(node)
                seen += len(names)
                unknown = set(names) - {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
                assert not unknown, f"{path.relative_to(PACKAGE)}: {node.name}"
    assert seen > 40


IMPORT_ALL = """
import importlib, pkgutil, sys
for name in ("transformers", "triton", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"):
    sys.modules[name] = None
server = ("speculative_mamba.serve.openai_api", "speculative_mamba.serve.metrics")
import speculative_mamba
for module in pkgutil.walk_packages(speculative_mamba.__path__, "speculative_mamba."):
    needs_triton = module.name.rpartition(".")[2].startswith("triton")
    if module.name not in ("speculative_mamba.run", "speculative_mamba._C", *server) and not needs_triton:
        importlib.import_module(module.name)
print("speculative_mamba._C" in sys.modules)
"""


def test_imports_need_no_optional_library_and_do_no_work() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=90)
    assert (result.stdout, result.stderr) == ("False\n", ""), (
        "prints nothing and loads no kernels until an op is called"
    )
