"""Memory that nobody wrote holds NaN in all tests; what the tests of the command line share."""

import pytest
import torch

from speculative_mamba import cli


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """PyTorch fills what ``torch.empty`` and its like return: with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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
