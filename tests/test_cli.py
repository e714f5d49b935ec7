"""The command line: text on stdout, the rest on stderr, one line and exit code 2 for bad input."""

import json
import os
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from cli_runs import PROMPT, SHORT, generated

import speculative_mamba as sm
from speculative_mamba import cli
from speculative_mamba import compare as compare_module
from speculative_mamba.cli.generate import PROMPT as DEFAULT_PROMPT
from speculative_mamba.decode.inputs import ACCEPTANCES
from speculative_mamba.decode.lookahead import AdaptiveLookahead

STATS = {
    "prompt_tokens", "tokens", "rounds", "row_rounds", "drafted", "tested", "accepted", "tested_per_position",
    "accepted_per_position", "draft_dropped_at", "setup_s", "prefill_s", "decode_s", "draft_s", "verify_s",
    "acceptance_rate", "tokens_per_round", "tokens_per_s", "peak_bytes",
}  # fmt: skip


def test_text_on_stdout_the_rest_on_stderr(run):
    code, out, err = run(*SHORT)
    assert code == 0 and out == generated() + "\n"
    assert "tokens/s" in err and "acceptance rate" in err
    assert all(line.startswith("speculative-mamba: ") for line in err.splitlines())


def test_no_options_at_all(run):
    code, out, err = run()
    assert code == 0 and out.startswith(DEFAULT_PROMPT) and len(out) > len(DEFAULT_PROMPT) + 30
    assert "builtin:draft" in err


@pytest.mark.parametrize(
    "extra",
    [
        ["--stream"],
        ["--draft", "none"],
        ["--draft", "ngram"],
        ["--draft", "ngram", "--K", "auto"],
        ["--K", "1"],
        ["--K", "15"],
        ["--K", "auto"],
        ["--model_target", "builtin:target", "--model_draft", "builtin:target"],
        ["--temperature", "0.7", "--top_k", "1"],
        ["--device", "cpu", "--backend", "cpu"],
    ],
    ids=" ".join,
)
def test_same_text_whatever_the_options(run, extra):
    code, out, _ = run(*SHORT, *extra)
    assert code == 0 and out == generated() + "\n"


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--stop", "e"],
        ["--temperature", "0.9", "--seed", "3"],
        ["--temperature", "0.9", "--seed", "3", "--acceptance", "coupled", "--repetition_penalty", "1.2"],
        ["--draft", "none", "--min_p", "0.1", "--temperature", "1.2"],
        ["--draft", "ngram", "--temperature", "0.5"],
    ],
    ids=" ".join,
)
def test_the_stream_is_the_text(run, extra):
    whole = run(*SHORT, *extra)
    streamed = run(*SHORT, *extra, "--stream")
    assert whole[0] == streamed[0] == 0 and whole[1] == streamed[1] and len(whole[1]) > len(PROMPT) + 1


SAMPLED = ["--temperature", "0.9", "--top_p", "0.9", "--min_p", "0.02", "--repetition_penalty", "1.1"]


@pytest.mark.parametrize("seed", ["0", "11"])
def test_coupled_text_is_the_plain_text_of_that_seed(run, seed):
    common = ["--prompt", PROMPT, "--n_tokens_to_generate", "24", *SAMPLED, "--seed", seed]
    plain = run(*common, "--draft", "none")
    assert plain[0] == 0
    for lookahead in ("1", "3", "4", "9", "15"):
        coupled = run(*common, "--acceptance", "coupled", "--K", lookahead)
        assert coupled[:2] == plain[:2]
    by_rejection = run(*common)
    assert by_rejection[0] == 0 and len(by_rejection[1]) > len(PROMPT)


def test_a_penalty_keeps_greedy_text_equal(run):
    common = ["--prompt", PROMPT, "--n_tokens_to_generate", "40", "--repetition_penalty"]
    outputs = [run(*common, "1.3", *extra)[1] for extra in ([], ["--draft", "none"], ["--K", "7"])]
    assert outputs[0] == outputs[1] == outputs[2] != run(*common, "1")[1]


@pytest.mark.parametrize("name", ["min_p", "repetition_penalty"])
def test_both_spellings_of_a_filter(run, name):
    common = ["--prompt", PROMPT, "--n_tokens_to_generate", "24", "--temperature", "1.5", "--seed", "4"]
    value = {"min_p": "0.3", "repetition_penalty": "1.6"}[name]
    outputs = [run(*common, f"--{n}", value) for n in (name, name.replace("_", "-"))]
    assert outputs[0][0] == 0 and outputs[0][1] == outputs[1][1] != run(*common)[1]


def test_cuda_graphs_on_a_cpu_are_one_line(run):
    _, plain_out, plain_err = run(*SHORT)
    code, out, err = run(*SHORT, "--cg")
    assert code == 0 and out == plain_out
    assert len(err.splitlines()) == len(plain_err.splitlines()) + 1
    assert sum("--cg" in line for line in err.splitlines()) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(run, dtype):
    """Plain and speculative text are equal in each; between dtypes they may differ."""
    outputs = [run(*SHORT, "--dtype", dtype, "--draft", draft) for draft in ("model", "none")]
    assert outputs[0][:2] == outputs[1][:2] and outputs[0][0] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_state_dtypes(run, dtype):
    """As with the weights: with a draft as without; float32 is the default."""
    outputs = [run(*SHORT, "--state_dtype", dtype, *extra)[:2] for extra in ([], ["--draft", "none"], ["--K", "2"])]
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0][0] == 0
    assert dtype != "float32" or outputs[0][1] == generated() + "\n"


def test_both_spellings(run):
    options = {"top_k": "20", "top_p": "0.8", "n_tokens_to_generate": "9", "model_target": "builtin:target"}
    common = ["--prompt", PROMPT, "--temperature", "0.8", "--seed", "5"]
    spelled = [[part for name, value in options.items() for part in (f"--{n(name)}", value)] for n in
               (str, lambda name: name.replace("_", "-"))]  # fmt: skip
    assert run(*common, *spelled[0])[1] == run(*common, *spelled[1])[1]


def test_seeds(run):
    sampled = [*SHORT, "--temperature", "0.9", "--top_k", "50", "--top_p", "0.95", "--seed"]
    texts = [run(*sampled, seed)[1] for seed in ("1", "1", "2", "3")]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_budget_zero(run):
    assert run("--prompt", PROMPT, "--n_tokens_to_generate", "0")[:2] == (0, PROMPT + "\n")


@pytest.mark.parametrize("extra", [[], ["--stream"]], ids=["whole", "stream"])
def test_stop_text(run, extra):
    """The text ends before whichever comes first, inside a drafted block too."""
    text = generated(tokens=30)
    for at in (1, 4, 9):
        stop = text[len(PROMPT) :][at : at + 3]
        arguments = ["--prompt", PROMPT, "--n_tokens_to_generate", "30", "--stop", stop, "--stop", "@@"]
        code, out, _ = run(*arguments, *extra)
        assert code == 0 and out == PROMPT + text[len(PROMPT) :].split(stop)[0] + "\n"


def test_json(run):
    code, out, _ = run(*SHORT, "--json", "--stream")
    report = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and set(report) == {"prompt_tokens", "tokens", "text", "stats"}
    assert set(report["stats"]) == STATS
    tokenizer = sm.load_model("builtin:target").tokenizer
    assert report["prompt_tokens"] == tokenizer.encode(PROMPT).ids
    assert PROMPT + report["text"] == tokenizer.decode(report["prompt_tokens"] + report["tokens"]) == generated()
    assert report["stats"]["tokens"] == len(report["tokens"]) == 12


@pytest.fixture(autouse=True)
def few_comparisons(monkeypatch):
    monkeypatch.setattr(compare_module, "_MOST", 2)


def test_compare(run):
    code, out, err = run(*SHORT, "--compare", "--json")
    compared = json.loads(out)["compare"]
    assert code == 0 and set(compared) == {"tokens_equal", "plain_tokens_per_s", "ratio", "ratio_range", "pairs"}
    assert compared["tokens_equal"] is True and compared["plain_tokens_per_s"] > 0 and compared["pairs"] == 2
    assert 0 < compared["ratio_range"][0] <= compared["ratio"] <= compared["ratio_range"][1]
    assert "the tokens are equal" in err
    assert re.search(r"ratio \d+\.\d+ \(\d+\.\d+ to \d+\.\d+ in 2 pairs of runs\)", err)


@pytest.mark.parametrize("budget", ["0", "1"])
def test_nothing_drafted_is_nothing_to_compare(run, budget):
    code, out, err = run("--prompt", PROMPT, "--n_tokens_to_generate", budget, "--compare", "--json")
    assert code == 0 and json.loads(out)["compare"]["ratio"] is None and "nothing to compare" in err


@pytest.mark.parametrize(
    ("ratios", "pairs"),
    [([2.0] * 40, 5), ([2.0, 2.01, 1.99, 2.0, 2.02], 5), ([1.0, 3.0] * 20, 31), ([9.0, 1.0, 2.0, 2.0] + [2.0] * 9, 7)],
    ids=["steady", "nearly", "never", "after outliers"],
)
def test_a_comparison_goes_on_until_its_spread_is_known(ratios, pairs, monkeypatch):
    """Runs take turns; the first of each kind, 100 times too slow here, counts on neither side."""
    monkeypatch.setattr(compare_module, "_MOST", 31)
    order, drafted = [], iter([0.01, *ratios])

    def plain():
        order.append("plain")
        return 1.0 if len(order) > 1 else 0.01

    def with_draft():
        order.append("draft")
        return next(drafted)

    timed = compare_module.compare(plain, with_draft)
    assert timed.ratios == ratios[:pairs] and order == ["plain", "draft"] * (pairs + 1)


def test_compare_of_sampled_text(run):
    """Rejection sampling keeps the distribution, not the text, so equality is not claimed."""
    _, out, err = run(*SHORT, "--compare", "--json", "--temperature", "1")
    assert json.loads(out)["compare"]["tokens_equal"] is None and "equal in distribution" in err


def test_compare_of_coupled_text(run):
    _, out, err = run(*SHORT, "--compare", "--json", "--temperature", "1", "--acceptance", "coupled")
    assert json.loads(out)["compare"]["tokens_equal"] is True and "the tokens are equal" in err


def test_compare_of_greedy_text_under_either_acceptance(run):
    """Greedy decoding leaves nothing to chance: the tokens are equal, whatever the draft is tested by."""
    for acceptance in ACCEPTANCES:
        _, out, _ = run(*SHORT, "--compare", "--json", "--acceptance", acceptance)
        assert json.loads(out)["compare"]["tokens_equal"] is True


def test_a_draft_of_ngrams_loads_no_model(run):
    """Nobody reads model_draft; speeds, statistics and the report line are as with a model."""
    repetitive = ["--prompt", "and the LORD said, " * 4, "--n_tokens_to_generate", "60", "--model_draft", "./absent"]
    code, out, err = run(*repetitive, "--draft", "ngram", "--compare", "--json")
    report = json.loads(out)
    assert code == 0 and "with draft ngram, backend" in err and "the tokens are equal" in err
    assert report["compare"]["tokens_equal"] is True
    assert set(report["stats"]) == STATS and 0 < report["stats"]["accepted"] <= report["stats"]["tested"]
    assert report["text"] == generated(repetitive[1], 60)[len(repetitive[1]) :]


def test_info(run):
    code, out, err = run("info")
    assert code == 0 and err == ""
    backends = [f"backend {name}" for name in ("cpu", "cuda", "triton", "reference")]
    for word in ("speculative-mamba", "torch", *backends, "instruction sets", "CUDA devices"):
        assert word in out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"speculative-mamba {sm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--K", "0"], "from 1 to 15"),
        (["--K", "16"], "from 1 to 15"),
        (["--K", "four"], "four"),
        (["--n_tokens_to_generate", "-1"], "--n_tokens_to_generate"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top_k", "-2"], "top_k"),
        (["--top_p", "0"], "top_p"),
        (["--top-p", "1.5"], "top_p"),
        (["--min_p", "1"], "min_p"),
        (["--min-p", "-0.1"], "min_p"),
        (["--min_p", "nan"], "min_p"),
        (["--min_p", "low"], "low"),
        (["--repetition_penalty", "0"], "repetition_penalty"),
        (["--repetition-penalty", "-1"], "repetition_penalty"),
        (["--repetition_penalty", "inf"], "repetition_penalty"),
        (["--repetition_penalty", "high"], "high"),
        (["--draft", "none", "--compare"], "--compare"),
        (["info", "foo"], "foo"),
        (["info", "--json"], "--json"),
        (["--prompt", "caf\udce9"], "UTF-8"),
        (["--model_target", "two\nlines"], "two"),
        (["--dtype", "two\nlines"], "two"),
        (["two\nlines"], "two"),
        (["--K=--"], "--"),
        (["--seed", "--"], "--"),
        (["--stop", "caf\udce9"], "UTF-8"),
        (["--threads", "0"], "from 1 to 1024"),
        (["--threads", "100000"], "from 1 to 1024"),
        (["--threads", "two"], "two"),
        (["--seed", "9" * 5000], "seed"),
        (["--K", "9" * 400], "from 1 to 15"),
        (["--K", "inf"], "inf"),
        (["--top_k", "9" * 400], "top_k"),
        (["--n_tokens_to_generate", "9" * 400], "--n_tokens_to_generate"),
        (["--n_tokens_to_generate", "1e3"], "1e3"),
        (["--temperature", "1e999"], "temperature"),
        (["--temperature", "-inf"], "temperature"),
        (["--top_p", "nan"], "top_p"),
        (["--min_p", "-inf"], "min_p"),
        (["--repetition_penalty", "1e999"], "repetition_penalty"),
        (["--model_target", "x" * 5000], "x"),
        (["--acceptance", "always"], "always"),
        (["--acceptance"], "acceptance"),
        (["--temperature", "-1", "--draft", "none"], "temperature"),
        (["--seed", "-1"], "seed"),
        (["--seed", "9223372036854775808"], "seed"),
        (["--seed", "1.5"], "1.5"),
        (["--dtype", "int8"], "q8_0, q4_0"),
        (["--state_dtype", "q8_0"], "q8_0"),
        (["--state-dtype", "nn"], "nn"),
        (["--device", "tpu"], "tpu"),
        (["--backend", "fast"], "fast"),
        (["--draft", "guess"], "guess"),
        (["--stop", ""], "argument --stop: must not be empty"),
        (["--unknown"], "--unknown"),
        (["--top"], "--top"),
        (["stray"], "stray"),
        (["--model_target", "./absent"], "does not exist"),
        (["--model_draft", "./absent"], "does not exist"),
        (["--model_target", "builtin:other"], "builtin:other"),
        (["--chat"], "no chat template"),
        (["--system", "caf\udce9"], "UTF-8"),
        (["--revision", "main"], "only a hub id"),
        (["--revision_draft", "v1"], "only a hub id"),
        (["--revision-draft", "v1", "--revision", ""], "revision must be"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, word):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and word in err


def test_revisions_of_hub_ids(run, monkeypatch):
    """Each model's own for all but the weights, which are then of that commit, whatever the name means by now.

    Catches: weights of the newest commit beside the config of another; the target's revision for the draft.
    """
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return Path(sm.__file__).parent / "models" / "builtin" / repository.split("/")[1]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    models = ["--model_target", "me/target", "--model_draft", "me/draft"]
    assert run(*SHORT, *models, "--revision", "v1.0", "--revision-draft", "main")[:2] == (0, generated() + "\n")
    assert asked == [("me/target", "v1.0"), ("me/draft", "main"), ("me/target", "target"), ("me/draft", "draft")]
    asked.clear()
    assert run(*SHORT, *models, "--draft", "none", "--revision", "v1.0")[0] == 0
    assert asked == [("me/target", "v1.0"), ("me/target", "target")]


SAMPLING = ["--temperature", "0.9"]


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        (["--top_k", "50", "--seed", "5"], ["--top_k", "--seed"]),
        (["--top_p", "0.9", "--min_p", "0.1"], ["--top_p", "--min_p"]),
        (["--acceptance", "coupled"], ["--acceptance"]),
        ([*SAMPLING, "--top_k", "1", "--seed", "3"], ["--temperature", "--seed"]),
        ([*SAMPLING, "--draft", "none", "--acceptance", "coupled"], ["--acceptance"]),
        (["--draft", "ngram", "--model_draft", "./absent"], ["--model_draft"]),
        (["--draft", "none", "--model_draft", "./absent", "--K", "3"], ["--model_draft", "--K"]),
        (["--draft", "ngram", "--revision_draft", "v1"], ["--revision_draft"]),
        (["--default_sampling"], ["--default_sampling"]),
        (["--json", "--stream"], ["--stream"]),
        (["--no_special_tokens"], ["--no_special_tokens"]),
        ([*SAMPLING, "--top_k", "50", "--seed", "5", "--acceptance", "coupled", "--K", "3"], []),
        (["--repetition_penalty", "1.2", "--draft", "ngram"], []),
    ],
    ids=" ".join,
)
def test_options_that_do_nothing_are_said_in_a_line_each(run, arguments, idle):
    code, _, err = run(*SHORT, *arguments)
    said = [line.split()[1] for line in err.splitlines() if "has no effect: " in line]
    assert code == 0 and sorted(said) == sorted(idle)


def test_more_threads_than_cores_are_said(run):
    threads = torch.get_num_threads()
    try:
        _, _, err = run(*SHORT, "--threads", "3000" if os.cpu_count() > 1000 else str(os.cpu_count() + 1))
    finally:
        torch.set_num_threads(threads)
    assert sum("cores that this process may use" in line for line in err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(run):
    code, out, err = run("--device", "cuda")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "cuda" in err


def test_ctrl_c_without_a_stream(run, monkeypatch):
    def interrupted(target, prompts, *, on_commit, **options):
        for token in target.tokenizer.encode(" heard").ids:
            on_commit([sm.CommittedToken(0, token, False)])
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.session, "generate", interrupted)
    code, out, err = run(*SHORT)
    assert (code, out) == (130, PROMPT + " heard\n") and len(err.splitlines()) == 1
    code, out, _ = run(*SHORT, "--json")
    report = json.loads(out)
    assert code == 130 and report["text"] == " heard" and report["stats"] is None


def test_a_gpu_without_room_is_one_line(run, monkeypatch):
    def full(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee also …")

    monkeypatch.setattr(cli.session, "generate", full)
    code, _, err = run(*SHORT)
    assert code == 2 and err.splitlines()[-1].startswith("speculative-mamba: error: CUDA out of memory. Tried to")
    assert "--dtype" in err and "See also" not in err


def test_ctrl_c_while_comparing_keeps_the_text(run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.generate, "_compare", interrupted)
    code, out, _ = run(*SHORT, "--compare")
    assert (code, out) == (130, generated() + "\n")
    code, out, _ = run(*SHORT, "--compare", "--json")
    report = json.loads(out)
    assert code == 130 and report["stats"]["tokens"] == len(report["tokens"]) and "compare" not in report


def test_a_draft_that_was_dropped_is_mentioned(capsys, monkeypatch):
    """In one line on stderr, and in the statistics."""
    monkeypatch.setattr(AdaptiveLookahead, "_speed", lambda self, drafts, rate, known: -drafts)
    assert cli.main(["--K", "auto", "--n_tokens_to_generate", "30", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["stats"]["draft_dropped_at"] == 5
    assert [line for line in err.splitlines() if "left out" in line and "5 rounds" in line and "--K auto" in line]
