"""Damaged checkpoints load, or are refused by one line: a few of those that fuzz.py makes."""

import subprocess
import sys
from pathlib import Path


def test_damaged_checkpoints() -> None:
    """In a process of its own, whose memory is bounded. Catches: a message with an unprintable name of a file's, an
    error of another library."""
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "300"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("300 damaged checkpoints, seed 0: "), result.stdout
