"""Where this copy of the package is, whose compiled modules it may load, and what to do when one is not to be had."""

import importlib
import platform
import re
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]
_VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)


def version_of(package: Path) -> str:
    """The version of the copy of speculative_mamba in a folder; "?" where it names none."""
    try:
        found = _VERSION.search((package / "__init__.py").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        found = None
    return found[1] if found else "?"


def other_copies() -> Iterator[Path]:
    """Folders of the package that are on the path and not in use."""
    seen = {PACKAGE}
    for entry in sys.path:
        folder = Path(entry, "speculative_mamba").resolve()
        if folder not in seen and folder.is_dir():
            seen.add(folder)
            yield folder


def ambiguity() -> str | None:
    """One line where the path holds the package in two versions, of which either may be meant."""
    mine = version_of(PACKAGE)
    for folder in other_copies():
        other = version_of(folder)
        if other not in (mine, "?"):
            return f"version {mine} in {PACKAGE} is used; the path also has {other} in {folder}: uninstall one"
    return None


def load(name: str, package: str = "speculative_mamba") -> ModuleType:
    """A compiled module.

    Raises:
        ImportError: in one line, it is missing or broken, is for another Python, or comes from another version.
    """
    try:
        module = importlib.import_module(f"{package}.{name}")
    except ImportError as error:
        raise ImportError(f"{package}.{name} cannot be loaded ({_cause(name, package, error)})") from None
    built, mine = getattr(module, "version", "?"), version_of(PACKAGE)
    if built != mine:
        raise ImportError(f"{package}.{name} cannot be loaded (built for version {built}, but used by {mine})")
    return module


def has(name: str, home: Path = PACKAGE) -> bool:
    """Whether a folder holds a compiled module for this Python, be it whole or broken."""
    return any((home / f"{name}{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def _cause(name: str, package: str, error: ImportError) -> str:
    home = PACKAGE if package == PACKAGE.name else Path(importlib.import_module(package).__path__[0])
    foreign = sorted(path.name for kind in ("so", "pyd") for path in home.glob(f"{name}.*.{kind}"))
    if has(name, home) or not foreign:
        return str(error).splitlines()[0]
    return f"{foreign[0]} is for another Python; {platform.python_version()} takes {name}{EXTENSION_SUFFIXES[0]}"


def cure(name: str, build: str, wheel: str) -> str:
    """What to do about a compiled module that is not to be had; another copy of the package may have it.

    Args:
        build: the command that builds it, where the package is in its source tree.
        wheel: the distribution that brings it elsewhere.
    """
    in_source_tree = (PACKAGE.parent / "setup.py").exists()
    command = build if in_source_tree else f"pip install --force-reinstall --no-deps {wheel}"
    for folder in other_copies():
        if has(name, folder):
            return f"{PACKAGE} hides the copy in {folder}, which has it: run from another folder or use {command}"
    return f"{'build' if in_source_tree else 'get'} it with: {command}"
