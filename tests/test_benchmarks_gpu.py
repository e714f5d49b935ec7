"""The benchmark for GPUs without one: works of tiny shapes on the CPU, the reference as the backend, no clock."""

import csv
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import measure, recurrences, updates
from benchmarks.gpu.attention import Attention
from benchmarks.gpu.cases import OPS, Case, cases
from benchmarks.gpu.choices import FILTERS, Accept, Commit, Sample
from benchmarks.gpu.recurrences import Conv, Recurrence, Scan, Ssd
from benchmarks.gpu.row_ops import Embedding, ExpertLinear, Linear, MlpActivation, Norm, SelectExperts
from benchmarks.gpu.work import WindowWork, Work
from speculative_mamba import ops
from speculative_mamba.ops import backend as backends
from speculative_mamba.testing.tolerance import assert_bitwise_equal

CPU, META = torch.device("cpu"), torch.device("meta")
KEYS = {
    "op", "backend", "shape", "dtype", "mode", "median_s", "gb_per_s", "share_of_bandwidth", "baseline", "ratio",
    "ratio_one_by_one", "ratio_triton", "ratio_mamba_ssm",
}  # fmt: skip


def tiny_works() -> Iterator[tuple[str, Callable[[torch.device], Work]]]:
    for batch, tokens in ((3, 5), (1, 1), (2, 2)):
        size = f"B{batch}-T{tokens}"
        yield f"causal_conv1d_verify-{size}", partial(Conv, 6, 4, batch, tokens)
        for dtype, mode in itertools.product((torch.float32, torch.bfloat16), ("snapshots", "replay")):
            option = f"{size}-{str(dtype).removeprefix('torch.')}-{mode}"
            yield f"selective_scan_verify-{option}", partial(Scan, 6, 5, batch, tokens, dtype, mode)
            yield f"ssd_verify-{option}", partial(Ssd, 4, 3, 5, batch, tokens, dtype, mode)
        yield f"attention_verify-{size}", partial(Attention, 4, 2, 8, 37, batch, tokens)
        for name, filters in FILTERS.items():
            yield f"sample_tokens-{size}-{name}", partial(Sample, 67, filters, batch)
            yield f"speculative_accept-{size}-{name}", partial(Accept, 67, filters, batch, tokens)
        yield f"commit_tokens-{size}", partial(Commit, 67, batch, tokens)
    for rows in (1, 5):
        yield f"skinny_linear-M{rows}", partial(Linear, 24, 7, rows, torch.bfloat16, torch.bfloat16)
        yield f"skinny_linear-M{rows}-q8_0", partial(Linear, 32, 7, rows, "q8_0", torch.float32)
        yield f"rms_norm-M{rows}", partial(Norm, 24, rows)
        yield f"mlp_activation-M{rows}", partial(MlpActivation, 24, rows)
        yield f"embed_tokens-M{rows}", partial(Embedding, 67, 24, rows)
        yield f"select_experts-M{rows}", partial(SelectExperts, 12, 3, rows)
        yield f"expert_linear-M{rows}", partial(ExpertLinear, 24, 7, 5, 2, rows)


TINY = dict(tiny_works())
every_work = pytest.mark.parametrize("name", TINY)
ONE_OF_EACH = list({name.split("-")[0]: name for name in reversed(TINY)}.values())


def tiny_case(name: str) -> Case:
    op = name.split("-")[0]
    return Case(op, "tiny", torch.float32, 0, {"tokens": 5, "batch": 3}, TINY[name], name.removeprefix(op))


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_MOST", 10)


class FakeTimer:
    """Runs everything once and finds that it took a microsecond, the baselines two."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __call__(self, contenders: dict[str, list[Callable[[], object]]]) -> dict[str, float]:
        for name, calls in contenders.items():
            self.calls[name] = len(calls)
            for call in calls:
                call()
        return {name: 1e-6 if name == "reference" else 2e-6 for name in contenders}

    def copy_bandwidth_gb_per_s(self) -> float:
        return 1000.0


@every_work
def test_the_reference_passes_the_check(name: str) -> None:
    TINY[name](CPU).check("reference")


@every_work
def test_sizes_are_known_without_memory(name: str) -> None:
    work, planned = TINY[name](CPU), TINY[name](META)
    assert (planned.moved, planned.launches) == (work.moved, work.launches)
    assert work.moved > 0 and work.launches > 0


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        # x and y, history read, window written, weight, bias
        (partial(Conv, 6, 4, 2, 5), 2 * 2 * 60 + 4 * 36 + 4 * 96 + 2 * 24 + 4 * 6),
        # one state read and five written, x, dt, z and y, B and C, A, D and dt_bias
        (partial(Scan, 6, 8, 2, 5, torch.float32, "snapshots"), 6 * 4 * 96 + 2 * (4 * 60 + 2 * 80) + 4 * (48 + 12)),
        # one state read and written, inputs x, dt and B too
        (partial(Scan, 6, 8, 2, 5, torch.bfloat16, "replay"),
         2 * 2 * 96 + 2 * 4 * (2 * 60 + 80) + 2 * (4 * 60 + 2 * 80) + 4 * (48 + 12)),
        (partial(Ssd, 4, 3, 8, 2, 5, torch.float32, "snapshots"),
         6 * 4 * 192 + 2 * (2 * 120 + 40 + 2 * 80) + 4 * (4 + 4 + 4)),
        (partial(Ssd, 4, 3, 8, 2, 5, torch.float32, "replay"),
         2 * 4 * 192 + 2 * 4 * (120 + 40 + 80) + 2 * (2 * 120 + 40 + 2 * 80) + 4 * (4 + 4 + 4)),
        (partial(Linear, 24, 7, 5, torch.bfloat16, torch.float32), 2 * (24 * 7 + 5 * 24) + 4 * 35),
        (partial(Linear, 64, 32, 5, "q4_0", torch.bfloat16), 32 * 2 * 18 + 2 * 5 * 64 + 2 * 5 * 32),
        (partial(Norm, 24, 5), 2 * (2 * 120 + 24) + 4 * 2 * 120),
        (partial(MlpActivation, 24, 5), 2 * 3 * 120),
        (partial(Embedding, 67, 24, 5), 2 * 2 * 120),
        # 37 entries read and 5 written of keys and values, q and y, k and v
        (partial(Attention, 4, 2, 8, 37, 3, 5), 2 * 2 * 3 * 2 * 8 * 42 + 2 * 2 * 3 * 5 * (32 + 16)),
        (partial(Sample, 67, FILTERS["top-p"], 3), 4 * 2 * 3 * 67),
        (partial(Sample, 67, FILTERS["greedy"], 3), 4 * 3 * 67),
        (partial(Accept, 67, FILTERS["top-p"], 3, 5), 4 * 3 * 5 * 67),
        # draft tokens and the next one, three numbers a row, one a draft token; last, position, remaining, active,
        # slots; stop tokens; record
        (partial(Commit, 67, 3, 5), 3 * (8 * 5 + 3 * 4 + 4 * 4 + 8 * 3 + 4 + 1 + 4 * 5 + 5 + 8 * 11)),
    ],
    ids=lambda value: value.func.__name__ if isinstance(value, partial) else None,
)  # fmt: skip
def test_bytes_by_hand(work: Callable[[torch.device], Work], moved: int) -> None:
    """Catches: a state's read or the inputs' write not counted."""
    assert work(META).moved == moved


@pytest.mark.parametrize("name", [name for name in TINY if issubclass(TINY[name].func, (Conv, Recurrence))])
def test_the_updates_of_pytorch_are_those_of_the_op(name: str) -> None:
    """Catches: updates without A, with the oldest input last, with another position's probabilities."""
    work = TINY[name](CPU)
    state = work.single.clone()
    actual = torch.stack(work.baselines()["torch"](), 1)
    after, work.single = work.single.clone(), state
    expected = torch.cat(work.one_by_one("reference"), 1)
    # Their sums round differently, and a state in bfloat16 may then be rounded to the other side.
    tolerance = {"atol": 0.02 * float(expected.abs().max()), "rtol": 0}
    torch.testing.assert_close(actual, expected.view_as(actual), **tolerance)
    torch.testing.assert_close(after, state, atol=0.02 * float(state.abs().max()), rtol=0)


@pytest.mark.parametrize("name", [name for name in TINY if issubclass(TINY[name].func, (Conv, Recurrence))])
def test_mamba_ssm_is_called_as_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def conv(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> None:
        assert state.shape == (*x.shape, weight.shape[1]) and weight.shape == (len(bias), 4) and activation == "silu"
        assert {part.dtype for part in (x, state, weight, bias)} == {torch.bfloat16}
        calls.append(x)

    def scan(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False) -> None:
        assert A.shape == state.shape[1:] and x.shape == dt.shape == state.shape[:-1] and dt_softplus
        assert B.shape == C.shape == (len(x), *[1] * (x.ndim - 2), state.shape[-1])
        assert D.shape == dt_bias.shape == x.shape[1:] and (z is None or z.shape == x.shape)
        calls.append(x)

    functions = {"causal_conv1d_update": conv, "selective_state_update": scan}
    monkeypatch.setattr(recurrences, "optional", lambda module, function: functions[function])
    work = TINY[name](CPU)
    work.baselines()["mamba_ssm"]()
    x = work.x if isinstance(work, Conv) else work.window["x"]
    assert_bitwise_equal(torch.stack(calls, 1), x)


@pytest.mark.parametrize(
    "name", [name for name in TINY if "attention" in name or ("-M" in name and "q8_0" not in name)]
)
def test_what_pytorch_computes_is_what_the_op_computes(name: str) -> None:
    work = TINY[name](CPU)
    expected, actual = work.run("reference"), work.baselines()["torch"]()
    actual = actual[0] if isinstance(actual, tuple) else actual
    actual = actual.transpose(1, 2) if isinstance(work, Attention) else actual
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_every_draft_is_right(filters) -> None:
    work = Accept(67, filters, 3, 5, CPU)
    for accepted in (work.run("reference")[0], work.baselines()["torch"]()[0]):
        assert accepted.tolist() == [4, 4, 4]


def test_pytorch_refuses_what_the_target_lacks() -> None:
    """Token 1 stands, as the draft was less sure of it, 4 does not; the probs of another position would leave none."""
    logits = torch.full((1, 3, 5), -torch.inf)
    logits[0, 0, 1] = logits[0, 1, 2] = logits[0, 2, 3] = 0
    probs = torch.zeros(1, 2, 5)
    probs[0, 0, 2] = probs[0, 1, 4] = 1
    accepted, token = updates.accept(logits, torch.tensor([[1, 4]]), probs, FILTERS["no filter"])
    assert (accepted.tolist(), token.tolist()) == ([1], [2])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_right_result_is_timed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    timer = FakeTimer()
    report, failures = command.time_cases([tiny_case(name)], ["reference"], CPU, timer, "card", torch.inf)
    (row,) = report.rows
    work = TINY[name](CPU)
    assert set(row) == KEYS | {"tokens", "batch"} and failures.count == 0
    assert row["gb_per_s"] == pytest.approx(work.moved / 1e3)
    assert row["share_of_bandwidth"] == pytest.approx(work.moved / 1e6)
    assert (row["ratio"], row["ratio_triton"]) == (pytest.approx(2), None)
    in_turn = isinstance(work, WindowWork) and work.tokens > 1
    assert row["ratio_one_by_one"] == (pytest.approx(2) if in_turn else None)
    assert timer.calls["reference"] == 10
    if in_turn:
        assert timer.calls["torch"] == timer.calls["reference one by one"] == 10 // work.tokens
    assert "1.00 us" in capsys.readouterr().out.splitlines()[-1]


def one_more(y: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(y, torch.full_like(y, torch.inf)) if y.is_floating_point() else y + 1


def in_company(y: torch.Tensor) -> None:
    """The least change of the last number, where there are several rows or tokens."""
    if len(y) > 1 or (y.ndim > 2 and y.shape[1] > 1):
        y.view(-1)[-1] = one_more(y.view(-1)[-1])


def everywhere(y: torch.Tensor) -> None:
    y.copy_(y * 1.02 if y.is_floating_point() else y + 1)


@pytest.fixture(params=[in_company, everywhere], ids=lambda mistake: mistake.__name__)
def wrong(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend that makes a mistake in what the reference has computed."""
    found = backends._implementation

    def implementation(op: str, backend: str) -> Callable:
        def call(*arguments: object) -> object:
            result = found(op, "reference")(*arguments)
            request.param(result[0] if isinstance(result, tuple) else result)
            return result

        return call if backend == "wrong" else found(op, backend)

    monkeypatch.setattr(backends, "_implementation", implementation)
    monkeypatch.setitem(backends.BACKENDS, "wrong", (("cpu",), lambda: (True, "for a test")))
    backends.resolve.cache_clear()
    yield "wrong"
    backends.resolve.cache_clear()


@pytest.mark.parametrize("name", [name for name in TINY if "B3" in name or "M5" in name])
def test_a_wrong_result_is_not_timed(name: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: no comparison with one token at a time, with rows alone or with the reference."""
    chosen = [tiny_case(name)]
    report, failures = command.time_cases(chosen, [wrong, "reference"], CPU, FakeTimer(), "card", torch.inf)
    assert [row["backend"] for row in report.rows] == ["reference"] and failures.count == 1
    assert f"{chosen[0]}, wrong: not timed: " in capsys.readouterr().err


def test_a_case_that_does_not_run_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(contenders: dict) -> dict:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    failures = measure.Failures()
    measure.measure(tiny_case(ONE_OF_EACH[0]), ["reference"], CPU, raises, None, failures)
    assert failures.count == 1 and "not timed: CUDA out of memory. Tried to allocate\n" in capsys.readouterr().err


def test_out_of_time(capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = command.time_cases([tiny_case(ONE_OF_EACH[0])] * 2, ["reference"], CPU, FakeTimer(), "card", 0)
    assert report.rows == [] and "out of time after 0 of 2 cases" in capsys.readouterr().err


def test_cases_are_distinct_and_the_first_of_each_op_comes_first() -> None:
    every = cases()
    assert len({str(case) for case in every}) == len(every)
    assert {case.op for case in every[: len(OPS)]} == set(OPS)
    assert set(OPS) == set(ops.__all__)
    near = [case for case in every if case.distance <= 1]
    assert all(case.work(META).moved > 0 for case in near) and len(near) > 90


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as with a GPU, which is the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test Card 80GB")
    monkeypatch.setattr(torch, "device", lambda name: CPU)
    monkeypatch.setattr(command, "GraphTimer", FakeTimer)
    monkeypatch.setattr(command, "usable_backends", lambda: ["reference"])
    monkeypatch.setattr(command, "cases", lambda: [tiny_case(name) for name in ONE_OF_EACH])


def test_the_command_writes_its_rows(on_a_card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "device_tests_pass", lambda: True)
    file = tmp_path / "rows.json"
    ops = ["ssd_verify", "rms_norm"]
    assert command.main(["--ops", *ops, "--results", str(tmp_path), "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    lines = list(csv.DictReader((tmp_path / "test-card-80gb.csv").open()))
    assert sorted(row["op"] for row in rows) == sorted(ops)
    assert [{key: line[key] for key in ("op", "backend")} for line in lines] == [
        {key: row[key] for key in ("op", "backend")} for row in rows
    ]
    assert [float(line["median_s"]) for line in lines] == [1e-6, 1e-6]


def test_failing_device_tests_end_it(
    on_a_card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "device_tests_pass", lambda: False)
    assert command.main(["--results", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert (out, error) == ("", "benchmarks.gpu: the device tests fail, so nothing is timed\n")
    assert list(tmp_path.iterdir()) == []
    assert command.main(["--no-tests", "--results", str(tmp_path)]) == 0


@pytest.mark.parametrize(("code", "passed"), [(0, True), (1, False), (5, False)], ids=["passed", "failed", "no test"])
def test_device_tests_are_run_by_pytest(code: int, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(arguments: list[str], **options: object) -> subprocess.CompletedProcess:
        commands.append(" ".join(arguments))
        return subprocess.CompletedProcess(arguments, code)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.device_tests_pass() is passed
    assert " -m pytest -m gpu " in commands[0] and commands[0].endswith(" tests/ops")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("benchmarks.gpu: torch sees no CUDA device") and error.count("\n") == 1


def test_predictions_need_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--predict"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Predictions for an H100, none of them measured.")
    assert {line.split()[0] for line in lines if line.split()[0] in OPS} == set(OPS)
    passes = [line.split() for line in lines if "one pass of 2.8b" in line]
    assert [cells[-3:] for cells in passes] and float(passes[0][-1]) > 1900
