"""What all tests share: the number of threads, and the command line."""

from collections.abc import Iterator

import pytest
import torch

from speculative_mamba import cli


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
