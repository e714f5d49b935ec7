"""The clock of the benchmark for GPUs, on a card that is a number, and on a real one where there is one."""

import contextlib
import types

import pytest
import torch

from benchmarks.gpu import timing


class FakeCard:
    """Stands for ``torch`` in the timer: a clock in milliseconds that work moves on, unless a graph records it."""

    int8 = torch.int8

    def __init__(self) -> None:
        self.clock, self.recorded, self.replayed = 0.0, None, []
        self.cuda = types.SimpleNamespace(
            graph_pool_handle=tuple, Stream=lambda: types.SimpleNamespace(wait_stream=lambda other: None),
            current_stream=lambda: None, stream=contextlib.nullcontext, CUDAGraph=lambda: FakeGraph(self),
            Event=lambda enable_timing: FakeEvent(self),
        )  # fmt: skip

    def zeros(self, size: int, dtype: torch.dtype, device: str) -> object:
        return types.SimpleNamespace(max=lambda: self.work(100.0), copy_=lambda source: self.work(size / 1e9))

    def work(self, milliseconds: float) -> None:
        if self.recorded is None:
            self.clock += milliseconds
        else:
            self.recorded.append(milliseconds)


class FakeGraph:
    def __init__(self, card: FakeCard) -> None:
        self.card, self.work = card, []

    def capture_begin(self, pool: tuple) -> None:
        self.card.recorded = self.work

    def capture_end(self) -> None:
        self.card.recorded = None

    def replay(self) -> None:
        self.card.replayed.append(sum(self.work))
        self.card.work(sum(self.work))


class FakeEvent:
    def __init__(self, card: FakeCard) -> None:
        self.card, self.at = card, 0.0

    def record(self) -> None:
        self.at = self.card.clock

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_graphs_take_turns_and_time_is_that_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a graph's time instead of a call's; the cold cache's cost inside the clock."""
    card = FakeCard()
    monkeypatch.setattr(timing, "torch", card)
    timer = timing.GraphTimer(rounds=3)
    times = timer({"a": [lambda: card.work(2.0)] * 8, "b": [lambda: card.work(3.0), lambda: card.work(5.0)]})
    assert times == {"a": pytest.approx(0.002), "b": pytest.approx(0.004)}
    assert card.replayed == [16, 8] * 4
    assert timer.copy_bandwidth_gb_per_s() == pytest.approx(2000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_is_timed() -> None:
    x = torch.ones(2**20, device="cuda")
    timer = timing.GraphTimer(rounds=3)
    times = timer({"one": [x.sum] * 8, "four": [lambda: [x.sum() for _ in range(4)]] * 8})
    assert 0 < times["one"] < times["four"] < 1e-3
    assert timer.copy_bandwidth_gb_per_s(2**26) > 10
