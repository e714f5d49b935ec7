"""The process around the program: its streams, its signals, and signs of life."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

PROGRAM = "speculative-mamba"
FAILURE = 2
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_FIRST_S, _LONGEST_S = 2.0, 30.0  # until the first sign of life, and between two at most


class OutputError(Exception):
    """stdout takes no more text. The message is empty where its reader has left, which is no fault."""


class Terminated(KeyboardInterrupt):
    """A signal that ends the program as Ctrl-C does: what there is is printed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As shells give it: 128 and the signal's number."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


class _Unbreakable(io.FileIO):
    """Takes what it cannot write as written: a stream of messages that is full or gone must not end the program."""

    def write(self, data: bytes) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def protect_streams() -> None:
    """For the start of a process: whatever is wrong with stderr, messages do no harm; stdout takes any character.

    A closed descriptor gets /dev/null, or the next file that is opened would take its place.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    encoding = getattr(sys.stderr, "encoding", "utf-8")
    messages = io.BufferedWriter(_Unbreakable(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(messages, encoding, errors="backslashreplace", line_buffering=True)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Sets the handler of the signals that end the program, but for those that the process was told to ignore."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave_at_once(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def say(message: str) -> None:
    """A line on stderr."""
    print(f"{PROGRAM}: {one_line(message)}", file=sys.stderr, flush=True)


def one_line(message: str) -> str:
    """Names that a message repeats may hold line ends."""
    return message.replace("\n", "\\n").replace("\r", "\\r")


def check_output() -> None:
    """
    Raises:
        OutputError: there is no stdout.
    """
    if sys.stdout is None:
        raise OutputError("stdout is closed; give the text somewhere to go")


def write(text: str) -> None:
    """Text on stdout, at once.

    Raises:
        OutputError: it cannot be written. What stdout had buffered is dropped.
    """
    check_output()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        left = isinstance(error, BrokenPipeError)
        reason = getattr(error, "strerror", None) or error
        raise OutputError("" if left else f"cannot write the text to stdout: {reason}") from None


@contextlib.contextmanager
def signs_of_life(describe: Callable[[], str | None]) -> Iterator[None]:
    """Says on stderr what is going on, if it takes long: after 2 seconds, 4, 8 and so on, at least every half minute.

    describe: gives the line, to which the time is added; None says nothing.
    """
    done, started = threading.Event(), time.monotonic()

    def watch() -> None:
        wait = _FIRST_S
        while not done.wait(wait):
            if (line := describe()) is not None:
                say(f"{line}, {time.monotonic() - started:.0f} s so far")
            wait = min(2 * wait, _LONGEST_S)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
