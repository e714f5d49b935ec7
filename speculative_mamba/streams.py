"""The process around the program: its streams, its signals, and signs of life."""

import contextlib
import io
import os
import shutil
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
_REDRAWN_S = 0.3  # until a line on a terminal is drawn, and drawn anew
_BAR = 24  # characters


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
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115


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


def shows_colours() -> bool:
    """Whether text on stdout may be coloured: it is a terminal, and nobody objects (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout is not None and sys.stdout.isatty() and not plain


def coloured(text: str) -> str:
    """Green."""
    return f"\x1b[32m{text}\x1b[39m"


@contextlib.contextmanager
def signs_of_life(
    describe: Callable[[], str | None], share: Callable[[], float | None] = lambda: None
) -> Iterator[Callable[[], None]]:
    """Says on stderr what is going on, if it takes long: after 2 seconds, 4, 8 and so on, at least every half minute.

    On a terminal it is one line that is drawn anew, with a bar where it is known how much is done, and that goes away.
    Yields what ends the signs before other text is written.

    describe: gives the line, to which the time is added; None says nothing. share: how much is done, 0 to 1.
    """
    done, started, terminal = threading.Event(), time.monotonic(), sys.stderr.isatty()

    def watch() -> None:
        wait, drawn = _REDRAWN_S if terminal else _FIRST_S, False
        while not done.wait(wait):
            line, seconds = describe(), time.monotonic() - started
            if terminal:
                drawn = _draw("" if line is None else f"{_bar(share())}{line}, {seconds:.0f} s", drawn)
                continue
            if line is not None:
                say(f"{line}, {seconds:.0f} s so far")
            wait = min(2 * wait, _LONGEST_S)
        _draw("", drawn)

    def end() -> None:
        done.set()
        watcher.join()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield end
    finally:
        end()


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    share = min(max(share, 0.0), 1.0)
    return f"[{'#' * round(share * _BAR):.<{_BAR}}] {share:4.0%} "


def _draw(line: str, drawn: bool) -> bool:
    """Draws a line over the one before it, if one was drawn. Whether there is one now."""
    if line or drawn:
        columns = shutil.get_terminal_size().columns
        print(f"\r{one_line(line)[: columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
    return bool(line)
