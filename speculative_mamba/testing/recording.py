"""Rounds that are recorded once and replayed as calls on the same memory, as a CUDA graph does, on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..decode.executors.cuda_graph import CapturedRound, GraphExecutor, SentRound
from ..decode.round import RoundResult
from ..ops import backend as backends


class Tape(TorchDispatchMode):
    """PyTorch's calls and those of ops made while it runs; ``replay`` makes them again with the same arguments, whose
    contents may have changed, and leaves the results where they lay the first time.

    What Python did between the calls is not done again: a value that was read from a tensor stays what it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable, tuple, dict, object]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        found = backends._implementation

        def implementation(op: str, backend: str) -> Callable:
            def call(*arguments: object) -> object:
                with torch.utils._python_dispatch._disable_current_modes():
                    results = found(op, backend)(*arguments)
                self._calls.append((found(op, backend), arguments, {}, results))
                return results

            return call

        backends._implementation = implementation
        try:
            with self:
                yield
        finally:
            backends._implementation = found

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (), options: dict | None = None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host reads a value within a round")
        results = function(*arguments, **(options or {}))
        self._calls.append((function, arguments, options or {}, results))
        return results

    def replay(self) -> None:
        for function, arguments, options, first in self._calls:
            _write_over(first, function(*arguments, **options))


def _write_over(first: object, now: object) -> None:
    if isinstance(first, torch.Tensor):
        if first.data_ptr() != now.data_ptr():  # neither a view nor in place
            first.copy_(now)
    elif isinstance(first, tuple | list):
        for one, other in zip(first, now, strict=True):
            _write_over(one, other)


class _Replayed(SentRound):
    """What a round left, kept until it is asked for."""

    def __init__(self, replay: Callable[[], RoundResult], output_logits: bool) -> None:
        result = replay()
        logits = result.logits.clone() if output_logits else result.logits
        self.result = replace(result, logits=logits)
        self._record = result.record.tolist()

    def wait(self) -> tuple[RoundResult, list[list[int]], float]:
        return self.result, self._record, 1.0


class RecordingExecutor(GraphExecutor):
    """``GraphExecutor`` with tapes for graphs: the same kinds, the same queue, no device. num_replays counts rounds."""

    device_type = "cpu"
    _sent = _Replayed

    def __init__(self, max_captured: int = 4) -> None:
        super().__init__(max_captured)
        self.num_captures = self.num_replays = 0

    def _capture(self, captured: CapturedRound, lookahead: int) -> Callable[[], RoundResult]:
        self.num_captures += 1
        tape = Tape()
        captured.round.run(lookahead)
        with tape.running():
            result = captured.round.run(lookahead)

        def replay() -> RoundResult:
            self.num_replays += 1
            tape.replay()
            return result

        return replay
