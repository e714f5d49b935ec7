"""A file of records, one JSON object a line, that is itself the account of what is done."""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Collection
from pathlib import Path
from types import TracebackType


class RecordFile:
    """Records that a run appends, and a later run goes on behind, whenever the first was killed.

    Every record begins with an ``id`` that names the piece of work it is the result of. A record counts when its line
    is complete, so what a kill left unfinished at the end is cut off. ``done`` has the ids that are there, in order.

    family: what ids of this run begin with. others: what ids of any such run begin with. Both tell whose a file is. One
    process at a time has the file; before each write it sees whether something else changed it. For use as a context
    manager.

    Raises:
        ValueError: the file is none of this run: it holds other lines, results of other work, or results twice; or it
            is in use.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, ids: Collection[str], family: str, others: str) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise ValueError(f"{path} is no plain file; results need one, to go on from after an interruption")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is being written by another run; wait for it, or name another") from None
            self.done = self._read(ids, family, others)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.close(self._file)

    def _read(self, ids: Collection[str], family: str, others: str) -> dict[str, None]:
        """Ids of all records. What is behind the last is cut off."""
        done: dict[str, None] = {}
        self._end = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    if not _begins(line, f'{{"id": "{family}'):
                        raise self._foreign(number)
                    break
                its = _id_of(line)
                if its not in ids:
                    raise self._foreign(number, its if isinstance(its, str) and its.startswith(others) else "", family)
                if its in done:
                    raise ValueError(f"{self._path}, line {number} holds a result that an earlier line has too")
                done[its] = None
                self._end += len(line)
        os.ftruncate(self._file, self._end)
        return done

    def _foreign(self, number: int, its: str = "", family: str = "") -> ValueError:
        whose = "is no result of such a run"
        if its:
            whose = "belongs to another input" if its.startswith(family) else "was made with other options"
        return ValueError(f"{self._path}, line {number} {whose}; name another output, or move this one away")

    def check(self) -> None:
        """
        Raises:
            OSError: the file is not as this run left it, or no longer at its path. What is there stays as it is.
        """
        mine, what = os.fstat(self._file), ""
        try:
            if not os.path.samestat(mine, os.stat(self._path)):
                what = "was replaced"
        except FileNotFoundError:
            what = "was moved away or deleted"
        if not what and mine.st_size != self._end:
            what = "was written or cut by another program"
        if what:
            raise OSError(
                f"{self._path} {what} during this run, which writes no more to it; the same command goes on if it "
                "holds results alone, or is gone"
            )

    def append(self, record: dict) -> None:
        """Writes a record. Whatever happens meanwhile, the file holds whole records afterwards.

        Raises:
            OSError: it cannot be written, or something else changed it; the file is as before.
        """
        self.check()
        data = json.dumps(record).encode() + b"\n"
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            if isinstance(error, OSError):
                raise OSError(
                    f"cannot write {self._path}: {error.strerror}; the results in it are whole, and the same command "
                    "goes on behind them"
                ) from None
            raise
        self._end += len(data)
        self.done[record["id"]] = None


def _id_of(line: bytes) -> object:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record.get("id") if isinstance(record, dict) else None


def _begins(data: bytes, text: str) -> bool:
    """Whether this is the beginning of a line that begins with a text."""
    expected = text.encode()
    return data[: len(expected)] == expected[: len(data)]
