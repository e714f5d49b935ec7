"""What all tests share: memory that nobody wrote holds NaN, the number of threads, and the command line."""

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

from speculative_mamba import cli
from speculative_mamba.decode.lookahead import remembered_costs

pytest_plugins = ["reduced"]


def pytest_collection(session: pytest.Session) -> None:
    """Modules and thousands of tests are there to stay, so the search for garbage need not look through them: not while
    they are made, nor later."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # objects, between searches: what tests make is mostly gone by then


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """PyTorch fills what ``torch.empty`` and its like return: with NaN, or the largest integer."""
    torch.set_deterministic_debug_mode("warn")
    assert torch.empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread unless the test asks for more: tensors are small, and threads that wait for one another spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys):
    """run(*arguments) → (exit code, stdout, stderr), in this process."""

    def call(*arguments):
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def _no_remembered_costs() -> None:
    """What "auto" measured in one test has no part in another."""
    remembered_costs.cache_clear()


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """A test leaves signals as they were: one that is ignored would be in every process that a later test starts."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
