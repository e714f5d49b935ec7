"""What is said where compiled modules and copies of the package do not fit together: one line, which tells the cure."""

import importlib
import os
import shutil
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

import speculative_mamba
from speculative_mamba.ops import backend as backends
from speculative_mamba.ops import installation

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for this installation's, which is no source tree and has no compiled modules yet."""
    folder = tmp_path / "speculative_mamba"
    folder.mkdir()
    shutil.copy(installation.PACKAGE / "__init__.py", folder)
    monkeypatch.setattr(installation, "PACKAGE", folder)
    monkeypatch.setattr(installation.has, "__defaults__", (folder,))
    monkeypatch.setattr(speculative_mamba, "__path__", [str(folder)])
    real = Path(speculative_mamba.__file__).parents[1]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != real])
    editable = [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("__editable__")]
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder not in editable])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("_C", "_C_cuda"):
        monkeypatch.delitem(sys.modules, f"speculative_mamba.{name}", raising=False)
        monkeypatch.delattr(speculative_mamba, name, raising=False)
    return folder


@pytest.fixture
def cuda_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The wheel speculative-mamba-cuda, and the module in it."""
    folder = tmp_path / "site" / "speculative_mamba_cuda"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    module = types.SimpleNamespace(
        version=speculative_mamba.__version__, architectures="90", problem=lambda: "", folder=folder
    )
    monkeypatch.setitem(sys.modules, "speculative_mamba_cuda._C_cuda", module)
    yield module
    sys.modules.pop("speculative_mamba_cuda", None)


def refusal(probe: object) -> str:
    module, reason = probe.__wrapped__()
    assert module is None and "\n" not in reason
    return reason


def test_a_wheel_for_another_python(package: Path) -> None:
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    reason = refusal(backends.extension)
    version = sys.version.split()[0]
    assert f"(_C.cpython-39-x86_64-linux-gnu.so is for another Python; {version} takes _C{SUFFIX}); " in reason
    assert reason.endswith("; get it with: pip install --force-reinstall --no-deps speculative-mamba")
    (package.parent / "setup.py").touch()
    assert refusal(backends.extension).endswith("; build it with: pip install -e .")


def test_a_module_of_another_version(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions may take other arguments.

    Catches: TypeError from the depth of a call.
    """
    module = types.SimpleNamespace(version="0.0.9", isa=lambda: "baseline")
    monkeypatch.setitem(sys.modules, "speculative_mamba._C", module)
    mine = speculative_mamba.__version__
    assert f"_C cannot be loaded (built for version 0.0.9, but used by {mine}); " in refusal(backends.extension)
    module.version = mine
    assert backends.extension.__wrapped__()[0] is module


def test_two_versions_on_the_path(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    other = tmp_path / "old" / "speculative_mamba"
    other.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(other.parent), *sys.path])
    mine = speculative_mamba.__version__
    (other / "__init__.py").write_text(f'__version__ = "{mine}"\n')
    backends.extension.__wrapped__()
    assert capsys.readouterr().err == "", "one version in two places"
    (other / "__init__.py").write_text('"""Old."""\n\n__version__ = "0.0.9"\n')
    backends.extension.__wrapped__()
    line = f"version {mine} in {package} is used; the path also has 0.0.9 in {other}: uninstall one"
    assert capsys.readouterr().err == f"speculative_mamba: {line}\n"


class TestTheCudaWheel:
    def test_is_found(self, package: Path, cuda_wheel: types.SimpleNamespace, capsys) -> None:
        assert backends.cuda_extension.__wrapped__() == (cuda_wheel, "CUDA kernels for 90")
        assert capsys.readouterr().err == ""

    def test_serves_where_the_module_beside_it_is_broken(
        self, package: Path, cuda_wheel: types.SimpleNamespace, capsys
    ) -> None:
        broken = package / f"_C_cuda{SUFFIX}"
        broken.write_bytes(b"not a shared library")
        importlib.invalidate_caches()
        assert backends.cuda_extension.__wrapped__()[0] is cuda_wheel
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            line.startswith("speculative_mamba: speculative_mamba._C_cuda cannot be loaded (") and str(broken) in line
        )
        assert line.endswith("); speculative_mamba_cuda is taken instead")

    def test_of_another_version_is_refused(self, package: Path, cuda_wheel: types.SimpleNamespace) -> None:
        cuda_wheel.version = "0.0.9"
        reason = refusal(backends.cuda_extension)
        assert "speculative_mamba_cuda._C_cuda cannot be loaded (built for version 0.0.9, but used by " in reason
        assert reason.endswith("; get it with: pip install --force-reinstall --no-deps speculative-mamba-cuda")

    def test_for_another_python_is_refused(
        self, package: Path, cuda_wheel: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "speculative_mamba_cuda._C_cuda")
        (cuda_wheel.folder / "_C_cuda.cpython-39-x86_64-linux-gnu.so").touch()
        reason = refusal(backends.cuda_extension)
        assert "(_C_cuda.cpython-39-x86_64-linux-gnu.so is for another Python; " in reason


def test_the_path_may_hold_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "speculative_mamba").mkdir()
    (tmp_path / "speculative_mamba" / "__init__.py").write_bytes(b"\xff")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(tmp_path / "nowhere"), os.devnull, *sys.path])
    assert installation.version_of(tmp_path / "speculative_mamba") == "?" and installation.ambiguity() is None
    assert installation.version_of(Path(speculative_mamba.__file__).parent) == speculative_mamba.__version__
