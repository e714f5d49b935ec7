"""Batch files: each line gets its own text, its place, or its refusal, and a run that was cut off is gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import speculative_mamba as sm
from speculative_mamba.decode import DecodeLoop
from speculative_mamba.serve import Engine, batch_files
from speculative_mamba.serve.batch_files import BatchRunner, id_family, read_again, read_lines
from speculative_mamba.serve.protocol import OPENAI_SAMPLING, ServedModel
from speculative_mamba.serve.record_file import RecordFile

ROOT = Path(sm.__file__).parents[1]
PROMPTS = ["She had not", "It was", "Mr. Darcy", "The rain", "A", "You are very kind", "In the morning,", "No one"]


@pytest.fixture(scope="module")
def pair():
    return sm.load_pair("builtin:target", "builtin:draft")


@pytest.fixture
def files(tmp_path):
    """files(*lines) writes the input; objects become JSON. The arguments of the command, and what it wrote."""

    def write(*lines):
        text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in text))
        return ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]

    return write


def results(arguments):
    return [json.loads(line) for line in Path(arguments[2]).read_bytes().splitlines()]


def texts(record):
    return [choice["text"] for choice in record["response"]["body"]["choices"]]


def call(custom_id, url="/v1/completions", method="POST", **body):
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def alone(pair, prompt, tokens, **sampling):
    """The text of a prompt, generated alone."""
    target = pair[0]
    ids = target.tokenizer.encode(prompt).ids
    sampling = sm.SamplingParams(**sampling)
    result = sm.generate(target, [ids], max_new_tokens=tokens, sampling=sampling)
    return target.tokenizer.decode(result.sequences[0].tolist()[len(ids) :])


def mixed():
    """Lines of both kinds and many lengths, and what each is to give: prompt, budget, sampling."""
    lines, expected = [], []
    for at in range(24):
        prompt, budget, seed = PROMPTS[at % 8] * (1 + at % 3), 4 + 7 * at % 20, at
        if at % 3 == 0:
            lines.append(prompt)
            expected.append((prompt, 9, {}))
        elif at % 3 == 1:
            lines.append({"prompt": prompt, "max_tokens": budget, "temperature": 0.7, "seed": seed})
            expected.append((prompt, budget, {"temperature": 0.7, "seed": seed}))
        else:
            lines.append(call(f"id {at}", prompt=prompt, max_tokens=budget, model="builtin:target"))
            expected.append((prompt, budget, {"temperature": 1.0, "seed": 5}))
    return lines, expected


@pytest.mark.parametrize("extra", [[], ["--unordered"]], ids=["in order", "unordered"])
def test_every_line_has_the_text_that_it_has_alone(run, files, pair, extra):
    """In its place, or without it; sampled text too, since acceptance is coupled unless asked otherwise."""
    lines, expected = mixed()
    arguments = files(*lines)
    code, out, err = run(*arguments, "--n_tokens_to_generate", "9", "--seed", "5", "--max_batch_size", "3", *extra)
    assert (code, out) == (0, "") and "24 lines in" in err and "acceptance rate" in err
    records = results(arguments)
    if extra:
        assert [record["line"] for record in records] != list(range(1, 25)), "a text of 22 tokens overtakes none of 4?"
        records.sort(key=lambda record: record["line"])
    assert [record["line"] for record in records] == list(range(1, 25))
    assert len({record["id"] for record in records}) == 24
    for line, record, (prompt, tokens, sampling) in zip(lines, records, expected, strict=True):
        assert texts(record) == [alone(pair, prompt, tokens, **sampling)] and record["error"] is None
        assert record["custom_id"] == (line.get("custom_id") if isinstance(line, dict) else None)
        assert record["response"]["status_code"] == 200 and record["response"]["request_id"] == record["id"]


BAD = [
    (b"not json", "invalid_json", "must be JSON"),
    (b'{"prompt": "a"', "invalid_json", "must be JSON"),
    (b'"caf\xe9"', "invalid_utf8", "byte 4 is not"),
    (b'{"prompt": "a", "temperature": NaN}', "invalid_json", "NaN is no number"),
    (b"[" * 100_000, "invalid_json", "nested too deeply"),
    (5, "invalid_line", "must be an object or a prompt, got 5"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "invalid_line", "body must be an object"),
    (call(7, prompt="a"), "invalid_line", "custom_id must be a text, got 7"),
    (call("a", method="GET", prompt="a"), "invalid_method", "must be POST, got 'GET'"),
    (call("a", url="/v1/embeddings", input="a"), "invalid_url", "got '/v1/embeddings'"),
    (call("a", prompt="a", best_of=3), 400, "best_of"),
    (call("a", prompt="a", stream=True), 400, "leave out stream"),
    (call("a", prompt="a", model="gpt"), 404, "the model 'gpt' does not exist"),
    (call("a", prompt="a" * 9000), 400, "maximum context length"),
    (call("a", url="/v1/chat/completions", messages=[{"role": "user", "content": "a"}]), 400, "no chat template"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": [[1, 2], [300]]}, 400, "300"),
    ({}, 400, "prompt is missing"),
    ({"prompt": "a", "speed": 3}, 400, "speed"),
    ({"prompt": "a", "seed": -1}, 400, "seed"),
    ({"prompt": "a", "seed": []}, 400, "seed"),
]


def test_bad_lines_get_a_record_and_harm_no_other(run, files, pair):
    lines = [line for bad, _, _ in BAD for line in (bad, "She")]
    arguments = files(*lines)
    code, _, err = run(*arguments, "--n_tokens_to_generate", "3")
    assert code == 0 and f"{len(BAD)} of the lines were refused" in err
    records, good = results(arguments), alone(pair, "She", 3)
    assert [texts(record) for record in records[1::2]] == [[good]] * len(BAD)
    for number, (record, (line, code, reason)) in enumerate(zip(records[::2], BAD, strict=True)):
        assert record["line"] == 2 * number + 1
        if isinstance(code, str):
            assert record["response"] is None and record["error"]["code"] == code, line
            assert record["error"]["message"].startswith(f"line {2 * number + 1}: ")
            assert reason in record["error"]["message"]
        else:
            assert record["error"] is None and record["response"]["status_code"] == code, line
            assert reason in record["response"]["body"]["error"]["message"]
        known = line.get("custom_id") if isinstance(line, dict) else None
        assert record["custom_id"] == (known if isinstance(known, str) else None)


def test_choices_blank_lines_and_several_prompts(run, files, pair):
    arguments = files(b"", {"prompt": PROMPTS[:2], "n": 2, "temperature": 0.8, "seed": 3}, b"  \t", "A\r")
    assert run(*arguments, "--n_tokens_to_generate", "6")[0] == 0
    first, second = results(arguments)
    expected = [alone(pair, prompt, 6, temperature=0.8, seed=seed) for prompt in PROMPTS[:2] for seed in (3, 4)]
    assert texts(first) == expected and [first["line"], second["line"]] == [2, 4]


def test_a_file_of_nothing(run, files):
    arguments = files()
    code, out, err = run(*arguments, "--model_target", "./absent")
    assert (code, out) == (0, "") and "all 0 lines" in err and Path(arguments[2]).read_bytes() == b""


def begun(run, files, *extra, lines=("She", "He", "It")):
    """Arguments of a run that has all but its last result, and the whole file."""
    arguments = [*files(*lines), "--n_tokens_to_generate", "3", *extra]
    assert run(*arguments)[0] == 0
    output = Path(arguments[2])
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(True)[:-1]) + whole.splitlines(True)[-1][:60])
    return arguments, whole


def same(data, whole):
    """Whether results are equal but for when they came, and for ids that are drawn."""

    def known(line):
        record = json.loads(line)
        return {**record, "response": {**record["response"], "body": record["response"]["body"]["choices"]}}

    return list(map(known, data.splitlines())) == list(map(known, whole.splitlines()))


@pytest.mark.parametrize("free", [[], ["--max_batch_size", "2"], ["--threads", "1"], ["--unordered"]], ids=" ".join)
def test_the_same_command_goes_on(run, files, free):
    arguments, whole = begun(run, files)
    code, _, err = run(*arguments, *free)
    data = Path(arguments[2]).read_bytes()
    assert code == 0 and "2 of 3 lines have their results; going on" in err and "1 lines in" in err
    assert data.startswith(b"".join(whole.splitlines(True)[:2])) and same(data, whole)
    assert run(*arguments)[0] == 0 and Path(arguments[2]).read_bytes() == data


OTHER = [["--K", "3"], ["--seed", "1"], ["--dtype", "float32"], ["--max_length", "99"]]


@pytest.mark.parametrize("other", OTHER, ids=" ".join)
def test_other_options_are_refused(run, files, other):
    arguments, _ = begun(run, files)
    before = Path(arguments[2]).read_bytes()
    code, out, err = run(*arguments, *other)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "line 1 was made with other options" in err
    assert Path(arguments[2]).read_bytes() == before


def test_another_input_is_refused(run, files):
    arguments, _ = begun(run, files)
    before = Path(arguments[2]).read_bytes()
    for lines, number in ((("She", "he", "It"), 2), (("He", "She", "It"), 1), (("She",), 2)):
        files(*lines)
        code, _, err = run(*arguments)
        assert code == 2 and len(err.splitlines()) == 1 and f"line {number} belongs to another input" in err
    assert Path(arguments[2]).read_bytes() == before
    files("She", "He", "It", "We")
    assert run(*arguments)[0] == 0 and [record["line"] for record in results(arguments)] == [1, 2, 3, 4]


def test_what_was_begun_unordered_has_no_order_to_keep(run, files):
    arguments, _ = begun(run, files)
    output = Path(arguments[2])
    output.write_bytes(output.read_bytes().splitlines(True)[1])
    code, _, err = run(*arguments)
    assert code == 2 and "was begun with --unordered" in err.splitlines()[-1]
    assert run(*arguments, "--unordered")[0] == 0
    assert results(arguments)[0]["line"] == 2 and len(results(arguments)) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({1: "/absent"}, "No such file"),
        ({1: "/"}, "Is a directory"),
        ({2: "/"}, "Is a directory"),
        ({1: "/dev/null"}, "is no plain file"),
        ({2: "/dev/full"}, "is no plain file"),
        ({2: "/absent/out"}, "No such file"),
        ({3: ["--max_batch_size", "0"]}, "from 1 to 1024"),
        ({3: ["--K", "auto"]}, "whole number from 1 to 15"),
        ({3: ["--temperature", "-1"]}, "temperature"),
        ({3: ["--model_target", "./absent"]}, "does not exist"),
        ({3: ["more"]}, "more"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(run, files, change, reason):
    arguments = files("She")
    for at, value in change.items():
        arguments[at : at + 1] = value if isinstance(value, list) else [value]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and reason in err


def test_a_pipe_is_no_input(run, files, tmp_path):
    """Neither one that is full of lines, nor one that nobody writes to."""
    reader, writer = os.pipe()
    os.write(writer, b'"She"\n')
    os.close(writer)
    os.mkfifo(tmp_path / "pipe")
    for pipe in (f"/dev/fd/{reader}", str(tmp_path / "pipe")):
        arguments = files("She")
        arguments[1] = pipe
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and f"{pipe} is no plain file" in err
        assert not Path(arguments[2]).exists()
    os.close(reader)


def test_an_input_is_no_output(run, files):
    arguments = files("She")
    arguments[2] = arguments[1]
    code, _, err = run(*arguments)
    assert code == 2 and "line 1 is no result" in err and Path(arguments[1]).read_text() == '"She"\n'


def test_a_full_disk_is_one_line(run, files, monkeypatch):
    """What is written is whole, and the same command goes on."""
    arguments, whole = begun(run, files)
    Path(arguments[2]).write_bytes(b"")
    write, calls = os.write, []

    def full(descriptor, data):
        calls.append(data)
        if len(calls) == 2:
            write(descriptor, data[:10])
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        code, _, err = run(*arguments)
    assert code == 2 and "No space left on device; the results in it are whole" in err.splitlines()[-1]
    assert same(Path(arguments[2]).read_bytes(), b"".join(whole.splitlines(True)[:1]))
    assert run(*arguments)[0] == 0 and same(Path(arguments[2]).read_bytes(), whole)


def test_ctrl_c_keeps_what_is_written(run, files, monkeypatch):
    arguments, whole = begun(run, files)
    Path(arguments[2]).write_bytes(b"")
    append = RecordFile.append

    def interrupted(self, record):
        append(self, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "append", interrupted)
        code, _, err = run(*arguments)
    assert code == 130 and "interrupted: 1 of 3 lines have their results" in err.splitlines()[-1]
    assert run(*arguments)[0] == 0 and same(Path(arguments[2]).read_bytes(), whole)


def on_append(monkeypatch, change):
    """Calls ``change`` once, behind the first result of a run."""
    append = RecordFile.append

    def changing(self, record):
        append(self, record)
        if len(self.done) == 1:
            change()

    monkeypatch.setattr(RecordFile, "append", changing)


@pytest.mark.parametrize("last", [False, True], ids=["before a result", "behind the last"])
def test_an_output_that_is_changed_under_the_run(run, files, monkeypatch, last):
    """It stays as it is, and the same command goes on with what is there."""
    arguments = [*files(*["She"] * (1 if last else 3)), "--n_tokens_to_generate", "3"]
    output = Path(arguments[2])
    with monkeypatch.context() as patch:
        on_append(patch, lambda: os.truncate(output, 0))
        code, _, err = run(*arguments)
    assert code == 2 and "was written or cut by another program" in err.splitlines()[-1]
    assert "lines in" not in err and output.read_bytes() == b""
    assert run(*arguments)[0] == 0 and len(results(arguments)) == (1 if last else 3)


MANY = [b'"line %d"' % number + b" " * 20_000 for number in range(40)]  # few of them are read ahead
CHANGES = {
    "a cut line": (lambda data: data[:-4], "in line 40"),
    "a lacking line": (lambda data: data[: data.index(b'"line 39"')], "and lacks lines"),
    "other lines": (bytes.upper, "in line"),
}


def many(files):
    return [*files(*MANY), "--n_tokens_to_generate", "1", "--max_batch_size", "1"]


@pytest.mark.parametrize(("change", "where"), CHANGES.values(), ids=CHANGES)
def test_an_input_that_is_changed_under_the_run(run, files, monkeypatch, change, where):
    """The results until then are those of the input as it was, and go on with it."""
    arguments = many(files)
    source = Path(arguments[1])
    data = source.read_bytes()
    with monkeypatch.context() as patch:
        on_append(patch, lambda: source.write_bytes(change(data)))
        code, _, err = run(*arguments)
    assert code == 2 and f"was changed during this run, {where}" in err.splitlines()[-1]
    source.write_bytes(data)
    code, _, err = run(*arguments)
    assert code == 0 and "have their results; going on" in err
    assert [record["line"] for record in results(arguments)] == list(range(1, 41))


def test_lines_that_are_added_under_the_run(tmp_path):
    """Each is read when it is whole: what a later run reads is the same."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'"a"\n\n"b"')
    ids = [line.id for line in read_lines(source, "")]
    for added, numbers in ((b"", [1, 3]), (b'\n"c"\n"d', [1, 3, 4]), (b'"\n', [1, 3, 4, 5])):
        source.write_bytes(source.read_bytes() + added)
        assert [line.number for line in read_again(source, "", ids)] == numbers
    source.write_bytes(b'"a"')
    lines = read_lines(source, "")
    next(lines)
    source.write_bytes(b'"a"\n"b"\n')
    assert list(lines) == [], "a line end that comes later is no blank line"


def test_an_engine_that_fails_is_one_line(run, files, monkeypatch):
    """What is written stays, and the same command goes on."""

    def failing(self):
        raise RuntimeError("the device is gone\nat address 0")

    arguments = many(files)
    with monkeypatch.context() as patch:
        on_append(patch, lambda: patch.setattr(DecodeLoop, "step", failing))
        code, out, err = run(*arguments)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and "the device is gone; " in last and " of 40 lines have their results" in last
    before = Path(arguments[2]).read_bytes()
    assert run(*arguments)[0] == 0 and Path(arguments[2]).read_bytes().startswith(before)
    assert [record["line"] for record in results(arguments)] == list(range(1, 41))


def test_a_model_that_breaks_a_line_spares_the_others(run, files, monkeypatch):
    """As a request that the engine refuses."""
    submit = Engine.submit

    def refusing(self, request):
        if len(request.prompt) == 2:
            raise ValueError("two are too few")
        return submit(self, request)

    monkeypatch.setattr(Engine, "submit", refusing)
    arguments = files("She", "He", "She")
    assert run(*arguments, "--n_tokens_to_generate", "2")[0] == 0
    assert [record["response"]["status_code"] for record in results(arguments)] == [200, 400, 200]


def test_lines_of_similar_length_run_together(files, pair, monkeypatch):
    """The longest of a window first."""
    queued = []

    class Pool(ThreadPoolExecutor):
        def submit(self, function, work):
            queued.append(work.length)
            return super().submit(function, work)

    monkeypatch.setattr(batch_files, "ThreadPoolExecutor", Pool)
    lengths = random.Random(1).sample(range(1, 200), 20)
    arguments = files(*({"prompt": "a" * length, "max_tokens": 1} for length in lengths))
    served = ServedModel(pair[0], "target", 1000, OPENAI_SAMPLING)
    with Engine(pair[0], max_batch_size=1) as engine:
        runner = BatchRunner(engine, served, served, {}, rows=1)
        records = list(runner.records(read_lines(Path(arguments[1]), id_family({}))))
    assert [record["line"] for record in records] == list(range(1, 21))
    windows = [sorted(lengths[at : at + 8], reverse=True) for at in (0, 8, 16)]
    assert queued == [length + 1 for window in windows for length in window]


def started(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "speculative_mamba", *arguments], stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("extra", [[], ["--unordered"]], ids=["in order", "unordered"])
def test_kill_at_any_moment(run, files, extra):
    """The results of a run that was killed again and again are those of one that was not.

    SPECULATIVE_MAMBA_KILLS sets how often; every fourth kill comes before there is a first new result.
    """
    kills = int(os.environ.get("SPECULATIVE_MAMBA_KILLS", 2 - len(extra)))
    draw = random.Random(len(extra))
    lines, _ = mixed()
    lines = [line for _ in range(2 + 3 * kills // 4) for line in lines] + [b"bad"]  # more than all runs get done
    arguments = [*files(*lines), "--max_batch_size", "2", "--n_tokens_to_generate", "9", *extra]
    output = Path(arguments[2])
    for kill in range(kills):
        process = started(arguments)
        size = output.stat().st_size if output.exists() else 0
        enough = size + 1 + draw.randrange(3000 if kill % 4 != 3 else 1)
        deadline = time.monotonic() + (draw.uniform(0, 2.5) if kill % 4 == 3 else 60)
        while time.monotonic() < deadline and process.poll() is None:
            if output.exists() and output.stat().st_size >= enough:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
    assert run(*arguments)[0] == 0
    data = output.read_bytes()
    output.unlink()
    assert run(*arguments)[0] == 0
    whole = output.read_bytes()
    killed, unbroken = (sorted(map(json.loads, its.splitlines()), key=lambda r: r["line"]) for its in (data, whole))
    assert [record["line"] for record in killed] == list(range(1, len(lines) + 1))
    for one, other in zip(killed, unbroken, strict=True):
        assert (one["id"], one["error"]) == (other["id"], other["error"])
        assert one["error"] or texts(one) == texts(other)
