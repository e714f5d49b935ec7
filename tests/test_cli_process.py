"""The command line as a process: started as a script and as a module, left by its reader, without its kernels."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import SHORT, generated

import speculative_mamba as sm
from speculative_mamba.cli.generate import PROMPT as DEFAULT_PROMPT

SCRIPT = Path(sm.__file__).parent / "run.py"


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(sm.__file__).parents[1])}, **options,
    )  # fmt: skip


def test_as_script_from_anywhere(tmp_path):
    process = start(SCRIPT, *SHORT, cwd=tmp_path)
    assert process.communicate()[0] == generated() + "\n" and process.returncode == 0


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["speculative_mamba.run", "speculative_mamba", "speculative_mamba.cli"])
def test_as_module(module, monkeypatch, capsys):
    """In this process, which keeps its own signals and stderr."""
    monkeypatch.setattr(sys, "argv", [module, *SHORT])
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not end.value.code and capsys.readouterr().out == generated() + "\n"


def test_bad_input_of_a_real_process():
    process = start(SCRIPT, "--model_target", "./absent", "--device", "cpu")
    out, err = process.communicate()
    assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1 and "Traceback" not in err


def test_reader_of_stdout_that_leaves():
    process = start(SCRIPT, "--stream", "--n_tokens_to_generate", "3000", "--draft", "none")
    process.stdout.read(len(DEFAULT_PROMPT) + 1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in err and "BrokenPipe" not in err


def test_without_the_compiled_kernels():
    """A broken or missing extension: one line, and the reference backend gives the same text."""
    program = (
        "import sys; sys.modules['speculative_mamba._C'] = None\n"
        "from speculative_mamba.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = start("-c", program, *SHORT, "--threads", "1")
    out, err = process.communicate()
    assert process.returncode == 0 and out == generated() + "\n"
    assert sum("_C" in line for line in err.splitlines()) == 1 and "backend reference" in err
    process = start("-c", program, *SHORT, "--backend", "cpu")
    out, err = process.communicate()
    assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1
