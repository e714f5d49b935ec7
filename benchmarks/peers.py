"""Times decoding against llama.cpp and transformers: the same random weights, interleaved in one run.

python -m benchmarks.peers [--models 370m] [--dtypes bfloat16 q8_0 q4_0] [--tokens 48] [--json FILE] [--plot FILE]
python -m benchmarks.peers --draw benchmarks/results/peers.json --plot benchmarks/results/peers.png

Needs llama-cpp-python with gguf, and transformers; one that is missing is skipped with a line that says so. Weights of
a published shape are random, written once as a bf16 checkpoint that transformers and we load, and as GGUF for
llama.cpp. All engines use as many threads as PyTorch does. Before any time is printed the float32 logits of every peer
must equal ours after a prefill, in a window and in a step; narrower weights must stay near them (logit_error, root mean
square over that of the logits).

step: one token, state and logits ready before and after. verify: five tokens in one pass, the logits of all five;
transformers loses its state in a pass of several tokens, so its pass starts from an empty one and could not verify
anything. prefill: from an empty state to the logits of the last token. decode: greedy text after a prefill of 32
tokens, choice of the token included; "scripted" drafts four tokens a round that are right at a stated rate, and runs a
real Mamba of at most 1/20 of the target's bytes for each. median_s is the time of one call, for decode that of one
token; steps the same over that of a step; ratio the baseline's time over ours.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import speculative_mamba as sm
from speculative_mamba.decode import ModelDrafter
from speculative_mamba.models.config import ModelConfig, mamba1_config
from speculative_mamba.ops.threads import num_threads
from speculative_mamba.testing.models import SHAPES, published_config, random_model
from speculative_mamba.testing.scripted import CapturableScript, agree_at_rate
from speculative_mamba.testing.timing import interleaved_medians

from .decode import LOOKAHEAD, PROMPT_TOKENS, draft_config
from .peer_files import gguf_file, write_checkpoint
from .report import Report, number, parser, progress, seconds, share

# What each engine calls the weights that are timed side by side.
DTYPES = {
    "float32": {"ours": "float32", "llama.cpp": "f32", "transformers": "float32"},
    "bfloat16": {"ours": "bfloat16", "llama.cpp": "bf16", "transformers": "bfloat16"},
    "q8_0": {"ours": "q8_0", "llama.cpp": "q8_0"},
    "q4_0": {"ours": "q4_0", "llama.cpp": "q4_0"},
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "q8_0": 0.2, "q4_0": 1.0}
TINY = mamba1_config(128, 6, 128)
WINDOW = LOOKAHEAD + 1
RATE = 0.8


class Ours:
    """``verify`` and ``prefill`` of this package."""

    name, modules, goes_on = "ours", ("speculative_mamba",), True

    def __init__(self, checkpoint: Path, dtype: str, longest: int) -> None:
        self.dtype = dtype
        self.model = sm.load_model(checkpoint, dtype=dtype)
        self.weight_bytes = self.model.weight_bytes
        self._slot = torch.zeros(1, dtype=torch.int32)
        self._cache = None

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        self._cache = self.model.new_cache(1, WINDOW)
        self._slot.zero_()
        self.model.prefill(tokens[:-1], self._cache, 0)
        return self.feed(tokens[-1:])

    def feed(self, tokens: list[int]) -> torch.Tensor:
        logits = self.model.verify(torch.tensor([tokens]), self._cache, self._slot)
        self._slot.fill_(len(tokens) - 1)
        return logits[0]

    def decode(self, prompt: list[int], count: int, draft: CapturableScript | None = None) -> sm.GenerationResult:
        settings = {"lookahead": LOOKAHEAD, "max_new_tokens": count, "stop_token_ids": ()}
        return sm.generate(self.model, [prompt], draft=draft, **settings)

    def seconds_per_token(self, prompt: list[int], count: int) -> float:
        return 1 / self.decode(prompt, count).stats.tokens_per_s

    def close(self) -> None:
        del self.model, self._cache


class Peer:
    """An engine that decodes plainly.

    prefill: from an empty state, (1, V) logits of the last token. feed: (T, V) logits of every token, going on from the
    state; one that does not ``goes_on`` feeds several tokens from an empty state only. Logits are valid up to the next
    call.
    """

    def seconds_per_token(self, prompt: list[int], count: int) -> float:
        self.prefill(prompt[:-1])
        token = prompt[-1]
        started = time.perf_counter()
        for _ in range(count):
            token = int(self.feed([token])[0].numpy().argmax())
        return (time.perf_counter() - started) / count


class LlamaCpp(Peer):
    """llama.cpp through the C interface of llama-cpp-python: the clock sees llama_decode and little else."""

    name, modules, goes_on = "llama.cpp", ("llama_cpp", "gguf"), True

    def __init__(self, checkpoint: Path, dtype: str, longest: int) -> None:
        self.dtype = dtype
        self._api = api = importlib.import_module("llama_cpp")
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        api.llama_backend_init()
        self._path = gguf_file(checkpoint, dtype)
        self._model = api.llama_model_load_from_file(str(self._path).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {self._path.name}")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = longest
        settings.n_threads = settings.n_threads_batch = num_threads()
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp gives no context")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.weight_bytes = api.llama_model_size(self._model)

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        return self._decode(tokens, wanted=1)

    def feed(self, tokens: list[int]) -> torch.Tensor:
        return self._decode(tokens, wanted=len(tokens))

    def _decode(self, tokens: list[int], wanted: int) -> torch.Tensor:
        """Logits of the last ``wanted`` tokens; with no positions given llama.cpp counts on from the last call's."""
        count = len(tokens)
        logits_of = (ctypes.c_int8 * count)(*(at >= count - wanted for at in range(count)))
        batch = self._api.llama_batch(n_tokens=count, token=(ctypes.c_int32 * count)(*tokens), logits=logits_of)
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        pointer = self._api.llama_get_logits(self._context)
        size = ctypes.c_float * (wanted * self._vocabulary)
        logits = size.from_address(ctypes.addressof(pointer.contents))
        return torch.frombuffer(logits, dtype=torch.float32).view(wanted, -1)

    def close(self) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
        if self.dtype != "f32":  # the others are made from this one
            self._path.unlink()


class Transformers(Peer):
    """``MambaForCausalLM`` called as its ``generate`` calls it."""

    name, modules, goes_on = "transformers", ("transformers",), False

    def __init__(self, checkpoint: Path, dtype: str, longest: int) -> None:
        self.dtype = dtype
        transformers = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._model = transformers.MambaForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self._cache = None

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        return self._forward(tokens, None, logits_to_keep=1)

    def feed(self, tokens: list[int]) -> torch.Tensor:
        return self._forward(tokens, self._cache if len(tokens) == 1 else None)

    def _forward(self, tokens: list[int], cache: object, **options: int) -> torch.Tensor:
        result = self._model(torch.tensor([tokens]), cache=cache, use_cache=True, **options)
        self._cache = result.cache
        return result.logits[0]

    def close(self) -> None:
        del self._model, self._cache
        gc.collect()  # modules refer to each other


Engine = Ours | LlamaCpp | Transformers
PEERS = (LlamaCpp, Transformers)


def available() -> list[type[Peer]]:
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


def probe(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """Logits of the prompt's last seven tokens: one after a prefill, five in a window if it can, one in a step."""
    parts = [engine.prefill(prompt[:-6]).clone()]
    window = [prompt[-6:-1]] if engine.goes_on else [[token] for token in prompt[-6:-1]]
    parts += [engine.feed(tokens).clone() for tokens in (*window, prompt[-1:])]
    return torch.cat(parts).float()


def logit_error(engine: Engine, prompt: list[int], expected: torch.Tensor, dtype: str) -> float:
    """Relative root-mean-square error of the logits.

    Raises:
        ValueError: above the dtype's tolerance, or in float32 another token is the likeliest anywhere.
    """
    actual = probe(engine, prompt)
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    if not error <= TOLERANCE[dtype]:
        raise ValueError(f"relative error of the logits {error:.1e} against ours in float32")
    if dtype == "float32" and not torch.equal(actual.argmax(-1), expected.argmax(-1)):
        raise ValueError("greedy tokens differ from ours")
    return error


def time_calls(engines: list[Engine], prompt: list[int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of each call by engine, for step, verify and prefill; engines take turns."""
    window = prompt[:WINDOW]
    calls = {
        "step": {engine.name: lambda engine=engine: engine.feed(window[:1]) for engine in engines},
        "verify": {engine.name: lambda engine=engine: engine.feed(window) for engine in engines},
        "prefill": {engine.name: lambda engine=engine: engine.prefill(prompt[: options.prefill]) for engine in engines},
    }
    rounds = {"prefill": max(1, options.rounds // 5)}
    times = {}
    for op, functions in calls.items():
        progress(f"timing {op}: {', '.join(functions)}")
        times[op] = interleaved_medians(functions, rounds.get(op, options.rounds))
    return times


def time_texts(
    engines: list[Engine], prompt: list[int], options: argparse.Namespace
) -> tuple[dict[str, float], list[sm.GenerationStats]]:
    """Median seconds per token of plain decoding by engine, and the statistics of our runs with a scripted draft."""
    spent: dict[str, list[float]] = {engine.name: [] for engine in engines}
    scripted = []
    ours = next((engine for engine in engines if isinstance(engine, Ours)), None)
    if ours is not None:
        text = ours.decode(prompt, options.tokens).sequences[0].tolist()
        cost = random_model(draft_config(ours.model), dtype=torch.bfloat16, seed=1)
        assert cost.weight_bytes * 20 <= ours.weight_bytes
    for repeat in range(options.repeats):
        progress(f"timing texts, {repeat + 1} of {options.repeats}")
        for engine in engines:
            spent[engine.name].append(engine.seconds_per_token(prompt, options.tokens))
        if ours is not None:
            draft = CapturableScript(
                [text], ours.model.vocab_size, agree_at_rate(RATE, repeat), cost=ModelDrafter(cost)
            )
            result = ours.decode(prompt, options.tokens, draft)
            if result.sequences[0].tolist() != text:
                raise SystemExit("the text with a draft differs from plain decoding; not timed")
            scripted.append(result.stats)
    return {name: statistics.median(values) for name, values in spent.items()}, scripted


def add_rows(
    report: Report,
    model: str,
    config: ModelConfig,
    errors: dict[Engine, float],
    times: dict[str, dict[str, float]],
    scripted: list[sm.GenerationStats],
    options: argparse.Namespace,
) -> None:
    """A row per engine and call; one of ours per baseline."""
    engines = {engine.name: engine for engine in errors}

    def add(
        op: str, engine: Engine, tokens: int, median: float, baselines: dict[str, float], label: str = "",
        passes: float = 1.0, **other: float,
    ) -> None:  # fmt: skip
        """passes: over the weights, in the median's time."""
        speed = None if op == "prefill" else passes * engine.weight_bytes / median / 1e9
        for baseline, theirs in (baselines or {None: None}).items():
            report.add(
                op=op, case=f"{model} {engine.name}{label}", backend="cpu",
                shape=f"{config.d_model}x{len(config.blocks)}", dtype=engine.dtype, batch=1, tokens=tokens,
                median_s=median, tokens_per_s=(1 if op == "decode" else tokens) / median,
                steps=median / times["step"][engine.name], gb_per_s=speed,
                share_of_bandwidth=speed and speed / report.bandwidth, logit_error=errors[engine],
                baseline=baseline, ratio=theirs and theirs / median, **other,
            )  # fmt: skip

    for op, tokens in {"step": 1, "verify": WINDOW, "prefill": options.prefill, "decode": 1}.items():
        peers = {f"{n} {engines[n].dtype}": s for n, s in times[op].items() if not isinstance(engines[n], Ours)}
        for name, median in times[op].items():
            add(op, engines[name], tokens, median, peers if isinstance(engines[name], Ours) else {})
    if scripted:
        add(
            "decode", engines[Ours.name], WINDOW, statistics.median(1 / s.tokens_per_s for s in scripted),
            {"plain decoding": times["decode"][Ours.name], **peers}, label=f" scripted {RATE}",
            passes=1 / statistics.mean(s.tokens_per_round for s in scripted),
            acceptance=sum(s.accepted for s in scripted) / sum(s.tested for s in scripted),
            tokens_per_round=statistics.mean(s.tokens_per_round for s in scripted),
        )  # fmt: skip


@torch.no_grad()
def bench(report: Report, model: str, kinds: list[type[Engine]], options: argparse.Namespace) -> None:
    """One model's shape. ``kinds`` begins with ours. float32 is always compared, and timed if it was asked for."""
    config = TINY if model == "tiny" else published_config(model)
    longest = max(512, options.prefill)
    prompt = torch.randint(0, config.vocab_size, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    short = prompt[:PROMPT_TOKENS]
    failed, expected = set(), None
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        progress(f"writing a random checkpoint of mamba-{model}")
        write_checkpoint(random_model(config, dtype=torch.bfloat16), checkpoint)
        for dtype in dict.fromkeys(("float32", *options.dtypes)):
            errors: dict[Engine, float] = {}
            with contextlib.ExitStack() as opened:
                for kind in kinds:
                    if kind in failed or kind.name not in DTYPES[dtype]:
                        continue
                    progress(f"loading {model} {kind.name} {DTYPES[dtype][kind.name]}, and comparing its logits")
                    try:
                        engine = kind(checkpoint, DTYPES[dtype][kind.name], longest)
                        opened.callback(engine.close)
                        if expected is None:
                            expected = probe(engine, short)
                        errors[engine] = logit_error(engine, short, expected, dtype)
                        if dtype not in options.dtypes:  # a large model in float32 fits once, but not three times
                            opened.close()
                    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
                        if expected is None:  # ours, which the peers are compared with
                            raise
                        print(f"{model} {kind.name} {DTYPES[dtype][kind.name]} not timed: {error}")
                        if dtype == "float32":
                            failed.add(kind)
                if dtype in options.dtypes:
                    times = time_calls(list(errors), prompt, options)
                    times["decode"], scripted = time_texts(list(errors), short, options)
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
    pyplot.title(f"mamba-{model} shape, one row, greedy")
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=110)
    pyplot.close()


def main(arguments: list[str] | None = None) -> None:
    known = parser(__doc__.splitlines()[0])
    known.add_argument("--models", nargs="*", default=["370m"], choices=[*SHAPES, "tiny"], help="whose shapes to run")
    known.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES, help="weights")
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
            "ratio": number, "baseline": str,
        }
    )  # fmt: skip
    for model in options.models:
        bench(report, model, kinds, options)
    report.write(options.json)
    if options.plot is not None:
        draw(report.rows, options.plot)


if __name__ == "__main__":
    main()
