"""Streams that are closed, full or broken, and signals: the text arrives, or one line and the exit code say why not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import speculative_mamba as sm
from speculative_mamba import cli, streams
from speculative_mamba.cli import session
from speculative_mamba.cli.generate import PROMPT

ROOT = Path(sm.__file__).parents[1]
SHORT = ["--prompt", "She had not", "--n_tokens_to_generate", "8"]
# The process around a program that is there at once: a line on stderr, the text on stdout, as ``cli.main`` does.
STUB = """
import sys, types
stub = sys.modules["speculative_mamba.cli"] = types.ModuleType("speculative_mamba.cli")
def work():
    from speculative_mamba.streams import say, write
    say("statistics")
    print("noise of a library", file=sys.stderr)
    write("caf\\xe9 \\u201ctext\\u201d\\n")
    return 7
stub.load, stub.main = len, work
from speculative_mamba.run import main
sys.exit(main())
"""


def shell(command, program=STUB, **environment):
    """Runs ``command`` of bash, in which $RUN is the program: (exit code, stdout, stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": program, "PYTHON": sys.executable, **environment}
    command = command.replace("$RUN", '"$PYTHON" -c "$PROGRAM"')
    process = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, timeout=60)
    return process.returncode, process.stdout.decode(), process.stderr.decode()


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- <&-", "2> >(true)", "2> >(head -c 1 >/dev/null)"])
def test_a_broken_stderr_never_touches_stdout(redirection):
    code, out, err = shell(f"$RUN {redirection}")
    assert (code, out, err) == (7, "café “text”\n", "")


def test_a_pipe_of_stderr_whose_reader_has_left(tmp_path):
    code, out, _ = shell(f"$RUN 2>&1 >{tmp_path}/out | true; code=${{PIPESTATUS[0]}}; cat {tmp_path}/out; exit $code")
    assert (code, out) == (7, "café “text”\n")


def test_characters_that_stdout_cannot_show():
    assert shell("$RUN", PYTHONIOENCODING="ascii")[:2] == (7, "caf? ?text?\n")
    assert shell("$RUN", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")[:2] == (7, "caf? ?text?\n")


def test_what_is_opened_takes_no_closed_streams_place():
    """With 2 closed the next file would be number 2, and messages of C libraries would go into it."""
    program = STUB.replace('say("statistics")', 'write(str(open("/dev/null").fileno() > 2))')
    assert shell("$RUN 2>&- <&-", program)[1].startswith("True")


@pytest.mark.parametrize("module", ["run", "cli"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_during_imports_leave_no_traceback(number, module):
    """While the program is imported, which takes as long as torch does."""
    program = (
        "import runpy, signal, sys, time\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup leaves it ignored
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(20)\n"
        "sys.meta_path.insert(0, Slow())\n"
        f"runpy.run_module('speculative_mamba.{module}', run_name='__main__')"
    )
    process = start("-c", program)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", "")


def test_importing_the_package_imports_no_torch():
    program = "import speculative_mamba, speculative_mamba.streams, sys; print('torch' in sys.modules)"
    assert shell("$RUN", program)[1] == "False\n"
    assert all(getattr(sm, name) is not None for name in sm.__all__) and set(sm.__all__) <= set(dir(sm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sm.nothing


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )  # fmt: skip


def test_signals_print_what_there_is():
    """What was generated so far is on stdout, streamed or not, and the exit code is 128 + the signal's number."""
    endless = (ROOT / "speculative_mamba" / "run.py", "--n_tokens_to_generate", "100000", "--stream")
    signals = (signal.SIGINT, signal.SIGTERM)
    processes = [start(*endless) for _ in signals]
    for process, number in zip(processes, signals, strict=True):
        beginning = process.stdout.read(len(PROMPT) + 10)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "Traceback" not in err and "interrupted after" in err
        text = beginning + out
        assert text.startswith(PROMPT) and len(text) >= len(PROMPT) + 10 and text.endswith("\n")


def test_a_signal_that_ends_a_run_without_a_stream(monkeypatch, capsys):
    def ended(target, prompts, *, on_commit, **options):
        for token in target.tokenizer.encode(" heard").ids:
            on_commit([sm.CommittedToken(0, token, False)])
        raise streams.Terminated(signal.SIGTERM)

    monkeypatch.setattr(session, "generate", ended)
    assert cli.main(SHORT) == 143
    assert capsys.readouterr().out == "She had not heard\n"


@pytest.fixture
def stdout(monkeypatch):
    """stdout(path) makes that file stdout, None a closed one."""
    files = []

    def replace(path):
        files.append(None if path is None else open(path, "w"))  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", files[-1])

    yield replace
    for file in filter(None, files):
        file.close()


@pytest.mark.parametrize("arguments", [SHORT, [*SHORT, "--stream"], [*SHORT, "--json"], ["info"], ["--help"]])
@pytest.mark.parametrize(("path", "reason"), [("/dev/full", "No space left on device"), (None, "stdout is closed")])
def test_a_stdout_that_takes_nothing_is_one_line(arguments, path, reason, stdout, capsys):
    stdout(path)
    assert cli.main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and reason in errors[0]


def test_signs_of_life(monkeypatch, capsys):
    """After a while, then ever more seldom; none for what is quick, and none for what can be seen."""
    monkeypatch.setattr(streams, "_FIRST_S", 0.02)
    with streams.signs_of_life(lambda: "reading 120000 prompt tokens"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and all(line.startswith("speculative-mamba: reading 120000") for line in lines)
    with streams.signs_of_life(lambda: None):
        time.sleep(0.1)
    monkeypatch.setattr(streams, "_FIRST_S", 5.0)
    with streams.signs_of_life(lambda: "quick"):
        pass
    assert capsys.readouterr().err == ""


def test_a_long_prompt_and_long_generation_give_signs_of_life(monkeypatch, capsys):
    def slow(target, prompts, *, on_commit, **options):
        time.sleep(0.2)
        on_commit([sm.CommittedToken(0, prompts[0][0], False)])
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "generate", slow)
    monkeypatch.setattr(streams, "_FIRST_S", 0.05)
    for extra, generating in (([], True), (["--stream"], False)):
        assert cli.main([*SHORT, *extra]) == 130
        err = capsys.readouterr().err
        assert "reading 11 prompt tokens" in err and ("generating, 1 of 8 tokens" in err) == generating
