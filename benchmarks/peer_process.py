"""An engine in a process of its own, so that one that crashes takes nothing else with it."""

import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .peer_engines import Engine

_PATIENCE_S = 1800
_CALLS = ("probe", "time_call", "seconds_per_token", "scripted")


class EngineError(Exception):
    """An engine refused a call, or its process has ended."""


class Remote:
    """Loads an engine in a new process, and calls it there. A context manager: the process ends with it."""

    def __init__(self, kind: type[Engine], source: Path, weights: str, longest: int) -> None:
        self.name, self.weights, self.goes_on = kind.name, weights, kind.goes_on
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, kind, source, weights, longest)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.weight_bytes: int = self._answer()
        except EngineError:
            self.close()
            raise

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """
        Raises:
            EngineError: the call failed, or the process has ended.
        """
        try:
            self._connection.send((name, arguments))
        except OSError:
            raise EngineError(self._end()) from None
        return self._answer()

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _answer(self) -> Any:
        if not self._connection.poll(_PATIENCE_S):
            self._process.kill()
            raise EngineError(f"no answer within {_PATIENCE_S} s")
        try:
            succeeded, value = self._connection.recv()
        except (EOFError, OSError):
            raise EngineError(self._end()) from None
        if not succeeded:
            raise EngineError(value)
        return value

    def _end(self) -> str:
        self._process.join()
        code = self._process.exitcode
        return (
            f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
        )


def _serve(connection: Connection, kind: type[Engine], source: Path, weights: str, longest: int) -> None:
    engine = None
    while True:
        try:
            if engine is None:
                engine = kind(source, weights, longest)
                value = engine.weight_bytes
            else:
                name, arguments = connection.recv()
                assert name in _CALLS
                value = getattr(engine, name)(*arguments)
        except EOFError:
            return
        except (ValueError, RuntimeError, TypeError, AttributeError, ImportError, OSError) as error:
            connection.send((False, (str(error).splitlines() or [type(error).__name__])[0]))
            if engine is None:
                return
        else:
            connection.send((True, value))
