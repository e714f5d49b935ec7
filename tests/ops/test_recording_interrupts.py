"""Ctrl-C while calls are being recorded."""

import dis
import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace

import pytest
import torch
from interrupts import run_traced

from speculative_mamba.ops import recording, rms_norm
from speculative_mamba.ops.backend import compiled
from speculative_mamba.ops.recording import is_recording, record, torch_op

# Code in which recording begins and ends.
FILES = ("/speculative_mamba/ops/recording.py", "/contextlib.py", "/torch/utils/_python_dispatch.py")
HANDLED_BEHIND = (
    "CALL",
    "JUMP_ABSOLUTE",
    "JUMP_BACKWARD",
    "RESUME",
)  # instructions behind which Python runs the handlers of signals


def interrupted_at(number: int, run: Callable[[], object]) -> KeyboardInterrupt | None:
    """Runs with a KeyboardInterrupt where for the ``number``-th time a signal could be handled in ``FILES``. It, or
    None if there were fewer."""
    left = number
    behind: dict[FrameType, bool] = {}

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal left
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            handled = behind.get(frame, True)
            behind[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(HANDLED_BEHIND)
            left -= handled
            if handled and left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return run_traced(trace, run)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list:
    """Those to which calls are recorded."""
    made = []

    class Noted(compiled(torch.empty(0))[0].Program):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(recording, "compiled", lambda like: (SimpleNamespace(Program=Noted), 1))
    return made


@pytest.mark.parametrize("known", [False, True])
def test_an_interrupt_anywhere_leaves_nothing_behind(programs: list, known: bool) -> None:
    """As long as the error is held, as an interactive Python does.

    Catches: a dispatch mode that refuses PyTorch's operations from then on; calls that are recorded to a program that
    nobody holds; results in memory that a recording shares.
    """
    x, weight, doubled = torch.randn(2, 8), torch.randn(8), torch.empty(2, 8)

    def step() -> torch.Tensor:
        rms_norm(x, weight, backend="cpu")
        torch_op(torch.mul, x, 2, out=doubled)
        return rms_norm(doubled, weight, backend="cpu")[0].view(16)

    number = 0
    while error := interrupted_at(number := number + 1, lambda: record(x, step, known=known)):
        assert not is_recording(), number
        assert (x + 1).shape == x.shape, number
        lengths = [len(program) for program in programs]
        rms_norm(x, weight, backend="cpu")
        assert [len(program) for program in programs] == lengths, number
        assert error.__traceback__ is not None
    assert number > 30
