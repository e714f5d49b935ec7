"""Times decoding against llama.cpp and transformers: the same random weights, interleaved in one run.

python -m benchmarks.peers [--models 370m] [--dtypes float32 bfloat16 q8_0 q4_0 q4_K_M] [--tokens 48] [--json FILE]
python -m benchmarks.peers --draw benchmarks/results/peers.json --plot benchmarks/results/peers.png

Needs llama-cpp-python with gguf, and transformers; one that is missing is skipped with a line that says so. Weights of
a published shape are random, written once as a bf16 checkpoint that transformers and we load, and as GGUF for
llama.cpp. Those of 8 and 4 bits are made from it by llama.cpp's own quantizer, one file for llama.cpp and us. Each
engine runs in a process of its own, with as many threads as PyTorch takes here: one that crashes is a row that says so.
Before any time is printed the float32 logits of every peer must equal ours after a prefill, in a window and in a step;
narrower weights must stay near them (logit_error, root mean square over that of the logits).

step: one token, state and logits ready before and after. verify: five tokens in one pass, the logits of all five;
transformers loses its state in a pass of several tokens, so its pass starts from an empty one and could not verify
anything. prefill: from an empty state to the logits of the last token. decode: greedy text after a prefill of 32
tokens, choice of the token included; "scripted" drafts four tokens a round that are right at a stated rate, and runs a
real Mamba of at most 1/20 of the target's bytes for each. median_s is the time of one call, for decode that of one
token; steps the same over that of a step; ratio the baseline's time over ours.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import speculative_mamba as sm
from speculative_mamba.models.config import ModelConfig, mamba1_config
from speculative_mamba.testing.hybrids import HYBRIDS
from speculative_mamba.testing.models import SHAPES, published_config, random_model

from .decode import PROMPT_TOKENS
from .peer_engines import RATE, WINDOW, Engine, LlamaCpp, Ours, Transformers
from .peer_files import gguf_file, write_checkpoint, write_random_checkpoint
from .peer_process import EngineError, Remote
from .report import Report, number, parser, progress, seconds, share

# What each engine calls the weights that are timed side by side, and how far their logits may be from ours in float32.
DTYPES = {
    "float32": ({"ours": "float32", "llama.cpp": "f32", "transformers": "float32"}, 1e-3),
    "bfloat16": ({"ours": "bfloat16", "llama.cpp": "bf16", "transformers": "bfloat16"}, 0.1),
    "q8_0": ({"ours": "q8_0", "llama.cpp": "q8_0"}, 0.2),
    "q4_0": ({"ours": "q4_0", "llama.cpp": "q4_0"}, 1.0),
    "q4_K_M": ({"ours": "q4_K_M", "llama.cpp": "q4_K_M"}, 1.0),
}
TINY = mamba1_config(256, 6, 256)
PEERS: tuple[type[Engine], ...] = (LlamaCpp, Transformers)


def available() -> list[type[Engine]]:
    """The peers whose libraries load, each with a line that says what it is or why it is skipped."""
    found = []
    for peer in PEERS:
        try:
            module, *_ = [importlib.import_module(name) for name in peer.modules]
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{peer.name} skipped: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        about = module.llama_print_system_info().decode() if peer is LlamaCpp else "PyTorch's operations"
        print(f"{peer.name}: {module.__name__} {module.__version__}, {about}")
        found.append(peer)
    return found


def source_of(kind: type[Engine], weights: str, checkpoint: Path) -> Path:
    """The file or folder that an engine loads."""
    in_gguf = kind is LlamaCpp or weights.startswith("q")
    return gguf_file(checkpoint, weights) if in_gguf else checkpoint


def logit_error(engine: Remote, prompt: list[int], expected: np.ndarray, weights: str) -> float:
    """Relative root-mean-square error of the logits.

    Raises:
        EngineError: above the tolerance, or in float32 another token is the likeliest anywhere.
    """
    actual = engine.call("probe", prompt)
    error = float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))
    if not error <= DTYPES[weights][1]:
        raise EngineError(f"relative error of the logits {error:.1e} against ours in float32")
    if weights == "float32" and not np.array_equal(actual.argmax(-1), expected.argmax(-1)):
        raise EngineError("greedy tokens differ from ours")
    return error


class Times:
    """Medians of what engines took in turns; one that fails is left out from then on."""

    def __init__(self, engines: list[Remote]) -> None:
        self.running, self.failed = list(engines), dict[str, str]()
        self._spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def turns(self, op: str, rounds: int, call: str, *arguments: object) -> None:
        progress(f"timing {op}: {', '.join(engine.name for engine in self.running)}")
        for _ in range(rounds):
            for engine in list(self.running):
                try:
                    self._spent[op][engine.name].append(engine.call(call, *arguments))
                except EngineError as error:
                    self.running.remove(engine)
                    self._spent[op].pop(engine.name, None)
                    self.failed[engine.name] = f"{op}: {error}"

    def of(self, op: str) -> dict[str, float]:
        """Median seconds by engine, of those that did not fail in it."""
        return {name: statistics.median(spent) for name, spent in self._spent[op].items()}


def time_all(
    engines: list[Remote], prompt: list[int], options: argparse.Namespace
) -> tuple[Times, list[sm.GenerationStats]]:
    """Every call of every engine, and the statistics of our runs with a scripted draft."""
    times, window, short = Times(engines), prompt[:WINDOW], prompt[:PROMPT_TOKENS]
    times.turns("step", options.rounds, "time_call", "step", window[:1])
    times.turns("verify", options.rounds, "time_call", "verify", window)
    times.turns("prefill", max(1, options.rounds // 5), "time_call", "prefill", prompt[: options.prefill])
    scripted = []
    for repeat in range(options.repeats):
        times.turns("decode", 1, "seconds_per_token", short, options.tokens)
        ours = next((engine for engine in times.running if engine.name == Ours.name), None)
        if ours is not None:
            scripted.append(ours.call("scripted", short, options.tokens, repeat))
    return times, scripted


def add_rows(
    report: Report,
    model: str,
    config: ModelConfig,
    errors: dict[Remote, float],
    times: Times,
    scripted: list[sm.GenerationStats],
    options: argparse.Namespace,
) -> None:
    """A row per engine and call; one of ours per baseline; one for an engine that failed."""
    engines = {engine.name: engine for engine in errors}

    def add(
        op: str, engine: Remote, tokens: int, median: float, baselines: dict[str, float], label: str = "",
        passes: float = 1.0, **other: float,
    ) -> None:  # fmt: skip
        """passes: over the weights, in the median's time."""
        speed = None if op == "prefill" else passes * engine.weight_bytes / median / 1e9
        for baseline, theirs in (baselines or {None: None}).items():
            report.add(
                op=op, case=f"{model} {engine.name}{label}", backend="cpu",
                shape=f"{config.d_model}x{len(config.blocks)}", dtype=engine.weights, batch=1, tokens=tokens,
                median_s=median, tokens_per_s=(1 if op == "decode" else tokens) / median,
                steps=median / times.of("step")[engine.name], gb_per_s=speed,
                share_of_bandwidth=speed and speed / report.bandwidth, logit_error=errors[engine],
                baseline=baseline, ratio=theirs and theirs / median, **other,
            )  # fmt: skip

    for op, tokens in {"step": 1, "verify": WINDOW, "prefill": options.prefill, "decode": 1}.items():
        medians = times.of(op)
        peers = {f"{name} {engines[name].weights}": s for name, s in medians.items() if name != Ours.name}
        for name, median in medians.items():
            add(op, engines[name], tokens, median, peers if name == Ours.name else {})
    if scripted:
        add(
            "decode", engines[Ours.name], WINDOW, statistics.median(1 / s.tokens_per_s for s in scripted),
            {"plain decoding": times.of("decode")[Ours.name], **peers}, label=f" scripted {RATE}",
            passes=1 / statistics.mean(s.tokens_per_round for s in scripted),
            acceptance=sum(s.accepted for s in scripted) / sum(s.tested for s in scripted),
            tokens_per_round=statistics.mean(s.tokens_per_round for s in scripted),
        )  # fmt: skip
    for name, reason in times.failed.items():
        add_failure(report, model, engines[name].name, engines[name].weights, reason)


def add_failure(report: Report, model: str, name: str, weights: str, reason: str) -> None:
    print(f"{model} {name} {weights} not timed: {reason}")
    report.add(op="failed", case=f"{model} {name}", backend="cpu", dtype=weights, error=reason)


def bench(report: Report, model: str, kinds: list[type[Engine]], options: argparse.Namespace) -> None:
    """One model's shape. ``kinds`` begins with ours. float32 is always compared, and timed if it was asked for."""
    config = TINY if model == "tiny" else published_config(model)
    if model in HYBRIDS and Transformers in kinds:
        print(f"{model} transformers not timed: of its models only Mamba's is")
        kinds = [kind for kind in kinds if kind is not Transformers]
    longest = max(512, options.prefill)
    prompt = torch.randint(0, config.vocab_size, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    short = prompt[:PROMPT_TOKENS]
    failed, expected = set(), None
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        progress(f"writing a random checkpoint of {model}")
        if model in HYBRIDS:
            write_random_checkpoint(HYBRIDS[model], checkpoint)
        else:
            write_checkpoint(random_model(config, dtype=torch.bfloat16), checkpoint)
        for weights in dict.fromkeys(("float32", *options.dtypes)):
            names, errors = DTYPES[weights][0], dict[Remote, float]()
            if weights.startswith("q") and LlamaCpp not in kinds:
                print(f"{model} {weights} not timed: its file is made by llama.cpp, which is missing")
                continue
            with contextlib.ExitStack() as running:
                for kind in kinds:
                    if kind in failed or kind.name not in names:
                        continue
                    progress(f"loading {model} {kind.name} {names[kind.name]}, and comparing its logits")
                    try:
                        source = source_of(kind, names[kind.name], checkpoint)
                        engine = running.enter_context(Remote(kind, source, names[kind.name], longest))
                        if expected is None:
                            expected = engine.call("probe", short)
                        errors[engine] = logit_error(engine, short, expected, weights)
                        if weights not in options.dtypes:  # a large model in float32 fits once, but not three times
                            running.close()
                    except (EngineError, RuntimeError) as error:
                        if expected is None:  # ours, which the peers are compared with
                            raise
                        add_failure(report, model, kind.name, names[kind.name], str(error))
                        if weights == "float32":
                            failed.add(kind)
                if weights in options.dtypes:
                    times, scripted = time_all(list(errors), prompt, options)
                    add_rows(report, model, config, errors, times, scripted, options)


def draw(rows: list[dict], file: Path) -> None:
    """Tokens per second of every engine and dtype, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds: dict[str, tuple[float, bool]] = {}
    for row in filter(lambda row: row["op"] == "decode", rows):
        model, engine, *scripted = row["case"].split()
        draft = f", with a draft (acceptance {row['acceptance']:.2f})" if scripted else ""
        speeds[f"{engine} {row['dtype']}{draft}"] = row["tokens_per_s"], engine == Ours.name
    pyplot.figure(figsize=(8, 0.4 * len(speeds) + 1))
    names = list(speeds)
    bars = pyplot.barh(names, [speed for speed, _ in speeds.values()])
    for bar, (speed, is_ours) in zip(bars, speeds.values(), strict=True):
        bar.set_color("tab:blue" if is_ours else "tab:gray")
        pyplot.text(speed, bar.get_y() + bar.get_height() / 2, f" {speed:.1f}", va="center")
    pyplot.gca().invert_yaxis()
    pyplot.xlim(right=1.12 * max(speed for speed, _ in speeds.values()))
    pyplot.xlabel("tokens per second")
    pyplot.title(f"{model} shape, one row, greedy")
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=110)
    pyplot.close()


def main(arguments: list[str] | None = None) -> None:
    known = parser(__doc__.splitlines()[0])
    known.add_argument(
        "--models", nargs="*", default=["370m"], choices=[*SHAPES, *HYBRIDS, "tiny"], help="whose shapes to run"
    )
    known.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES, help="formats of weights")
    known.add_argument("--tokens", type=int, default=48, help="tokens per text")
    known.add_argument("--prefill", type=int, default=512, help="tokens of a prefill")
    known.add_argument("--rounds", type=int, default=15, help="interleaved calls; a fifth as many prefills")
    known.add_argument("--repeats", type=int, default=3, help="interleaved texts; medians are shown")
    known.add_argument("--plot", type=Path, metavar="FILE", help="also draw the speeds, as PNG")
    known.add_argument("--draw", type=Path, metavar="FILE", help="time nothing, but draw what --json wrote")
    options = known.parse_args(arguments)
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    if options.draw is not None:
        if options.plot is None:
            known.error("--draw needs --plot FILE")
        return draw(json.loads(options.draw.read_text(encoding="utf-8")), options.plot)
    kinds = [Ours, *available()]
    report = Report(
        {
            "op": str, "case": str, "dtype": str, "tokens": str, "median_s": seconds, "tokens_per_s": number,
            "steps": number, "acceptance": number, "share_of_bandwidth": share, "logit_error": "{:.1e}".format,
            "ratio": number, "baseline": str, "error": str,
        }
    )  # fmt: skip
    for model in options.models:
        bench(report, model, kinds, options)
    report.write(options.json)
    if options.plot is not None:
        draw(report.rows, options.plot)


if __name__ == "__main__":
    main()
