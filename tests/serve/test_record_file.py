"""A file that is its own account of what is done: cut anywhere, full, foreign, in use."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from speculative_mamba.serve.record_file import RecordFile

FAMILY, OTHERS = "run_1_", "run_"
IDS = [f"{FAMILY}{number}" for number in range(4)]
RECORDS = [{"id": its, "text": "é\n" * number} for number, its in enumerate(IDS)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def opened(path):
    return RecordFile(path, IDS, FAMILY, OTHERS)


def test_a_file_that_is_cut_anywhere_is_gone_on_with(path):
    with opened(path) as file:
        for record in RECORDS:
            file.append(record)
        assert list(file.done) == IDS
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == RECORDS
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with opened(path) as file:
            count = whole[:size].count(b"\n")
            assert list(file.done) == IDS[:count]
            assert path.read_bytes() == b"".join(whole.splitlines(True)[:count])
            for record in RECORDS[count:]:
                file.append(record)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"id": "run_1_9"}\n', "line 1 belongs to another input"),
        ('{"id": "run_1_0"}\n{"id": "run_2_1"}\n', "line 2 was made with other options"),
        ('{"id": "run_1_0"}\n{"id": "run_1_0"}\n', "line 2 holds a result that an earlier line has too"),
        ('{"id": "run_1_0"}\n\n', "line 2 is no result"),
        ('{"id": 5}\n', "line 1 is no result"),
        ('{"id": ["run_1_0"]}\n', "line 1 is no result"),
        ("[" * 100_000 + "\n", "line 1 is no result"),
        ("\0\n", "line 1 is no result"),
        ("notes", "line 1 is no result"),
        ('{"id": "run_2_', "line 1 is no result"),
        ('{"id": "run_1_0"}\nnotes', "line 2 is no result"),
    ],
    ids=lambda value: ascii(value[:30]),
)
def test_a_file_of_something_else_is_refused_and_stays(path, content, reason):
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"out\.jsonl, {reason}"):
        opened(path)
    assert path.read_text() == content


def test_one_run_at_a_time(path):
    with opened(path) as file:
        with pytest.raises(ValueError, match="is being written by another run"):
            opened(path)
        file.append(RECORDS[0])
    with opened(path) as file:
        assert list(file.done) == IDS[:1]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", "/dev/full", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is no plain file"):
            opened(path)
    for path in (tmp_path, tmp_path / "absent" / "out"):
        with pytest.raises(OSError, match=str(path)):
            opened(path)


@pytest.fixture
def disk():
    """disk(size): no file may grow beyond so many bytes, so that a write ends in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full(path, disk):
    """What is written stays, and nothing else; with room it goes on."""
    with opened(path) as file:
        file.append(RECORDS[0])
        written = path.read_bytes()
        disk(len(written) + 7)
        with pytest.raises(OSError, match=r"cannot write .*out\.jsonl: File too large; the results in it are whole"):
            file.append(RECORDS[1])
        assert path.read_bytes() == written
        disk(None)
        file.append(RECORDS[1])
        assert list(file.done) == IDS[:2]
    assert path.read_bytes() == b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS[:2])


def test_an_interruption_within_a_record(path, monkeypatch):
    write = os.write

    def interrupted(descriptor, data):
        write(descriptor, data[:5])
        raise KeyboardInterrupt

    with opened(path) as file:
        file.append(RECORDS[0])
        written = path.read_bytes()
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.append(RECORDS[1])
        assert path.read_bytes() == written and list(file.done) == IDS[:1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: os.truncate(path, 0), "was written or cut"),
        (lambda path: path.open("a").write("notes\n"), "was written or cut"),
        (lambda path: path.unlink(), "was moved away or deleted"),
        (lambda path: path.rename(path.with_name("moved")), "was moved away or deleted"),
        (lambda path: Path(shutil.copy(path, path.with_name("copy"))).replace(path), "was replaced"),
    ],
    ids=["cut", "written", "deleted", "moved", "replaced"],
)
def test_a_file_that_something_else_changed_is_left_alone(path, change, reason):
    with opened(path) as file:
        file.append(RECORDS[0])
        file.check()
        change(path)
        left = contents(path.parent)
        for use in (file.check, lambda: file.append(RECORDS[1])):
            with pytest.raises(OSError, match=rf"out\.jsonl {reason}"):
                use()
        assert contents(path.parent) == left and list(file.done) == IDS[:1]


@pytest.mark.parametrize("change", [b"", b"notes\n"], ids=["cut", "written"])
def test_a_change_between_the_look_and_the_write_shows_next_time(path, monkeypatch, change):
    """No hole is left, and nothing written over."""
    write = os.write

    def changing(descriptor, data):
        path.write_bytes(change and path.read_bytes() + change)
        return write(descriptor, data)

    with opened(path) as file:
        file.append(RECORDS[0])
        before = path.read_bytes() + change if change else b""
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", changing)
            file.append(RECORDS[1])
        assert path.read_bytes() == before + json.dumps(RECORDS[1]).encode() + b"\n"
        with pytest.raises(OSError, match="was written or cut"):
            file.check()
