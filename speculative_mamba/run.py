"""``python speculative_mamba/run.py``: the paper's command line. ``speculative-mamba`` is the same program."""

import signal
import sys
from pathlib import Path


def main() -> int:
    """The program as a process: its streams and signals are set before anything that takes long is imported."""
    from speculative_mamba import streams

    streams.protect_streams()
    streams.handle_signals(streams.leave_at_once)
    try:
        from speculative_mamba import cli

        cli.load(sys.argv[1:])
    except ModuleNotFoundError as error:
        install = f"{sys.executable} -m pip install -c constraints.txt -e ."
        streams.say(f"error: {error.name} is not installed here; install it with: {install}")
        return streams.FAILURE
    used, beside = Path(streams.__file__).resolve().parent, Path(__file__).resolve().parent
    if used != beside:
        streams.say(f"this runs the installed copy in {used}, not {beside}; to run the latter: pip install -e .")
    streams.handle_signals(streams.interrupt)
    try:
        code = cli.main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt as interrupt:
        code = streams.exit_code(interrupt)
    streams.handle_signals(signal.SIG_IGN)  # all is written
    return code


if __name__ == "__main__":
    if not __package__:  # run by its path: the package's own folder is not one to import from
        folder = Path(__file__).resolve().parent
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder] + [str(folder.parent)]
    sys.exit(main())
