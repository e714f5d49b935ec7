"""What the tests of the command line share."""

import pytest

from speculative_mamba import cli


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
