"""Times an engine against its width, and the second turn of a chat with and without the prefix cache.

python -m benchmarks.serve [--models embedded 130m] [--widths 1 2 4 8 16 32 64] [--chat 8192] [--plot FILE]
                           [--llama_server PROGRAM]

Twice as many requests as there are rows arrive at once, so that half of them join while others run. Their prompts have
32 tokens, their budgets are 0.75, 1 and 1.25 times --tokens. "embedded" is the embedded pair on text that it has not
seen, four tokens drafted; the published shapes have random bf16 weights and no draft. static is ``generate`` with as
many rows of one budget, which takes turns with the engine; ratio of the seconds, cpu_ratio of the CPU time of the
process, prompts included. Every text of the engine is compared with the one that ``generate`` gives before a time is
printed. With --llama_server llama.cpp's server takes turns too, on the same weights of a published shape, with as many
slots as there are rows and the same requests over HTTP. Under many clients: ``benchmarks.serve_load``.
A chat's first turn has as many tokens as --chat says, the second 20 more. first_s is the time from ``submit`` to the
first token of the second turn; ratio, the same without a prefix cache over it.
"""

import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import MAMBA2_SHAPES, SHAPES, published_config, random_model

from .report import Report, number, parser, progress, seconds

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
PROMPT_TOKENS = 32
PORT = 18080  # of llama.cpp's server
BUDGETS = (0.75, 1.0, 1.25)


def models_of(name: str) -> tuple[sm.MambaLM, sm.MambaLM | None, list[int]]:
    """Target, draft, and a text for prompts."""
    progress(f"the weights of {name}")
    if name == "embedded":
        target, draft = sm.load_model("builtin:target"), sm.load_model("builtin:draft")
        text = Path(sm.__file__).parent.joinpath("models", "builtin", "heldout.txt").read_text("utf-8")
        return target, draft, target.tokenizer.encode(text).ids
    target = random_model(published_config(name), dtype=torch.bfloat16)
    source = torch.Generator().manual_seed(0)
    return target, None, torch.randint(0, target.vocab_size, (1 << 15,), generator=source).tolist()


def requests_of(text: list[int], count: int, tokens: int) -> list[sm.Request]:
    budgets = [max(1, round(factor * tokens)) for factor in BUDGETS]
    step = len(text) // count
    return [
        sm.Request(text[at * step : at * step + PROMPT_TOKENS], budgets[at % len(budgets)], stop_token_ids=())
        for at in range(count)
    ]


def served(engine: sm.Engine, requests: list[sm.Request]) -> list[list[int]]:
    """Their texts."""
    completions = [engine.submit(request) for request in requests]
    return [completion.result().tokens for completion in completions]


def batches(target: sm.MambaLM, draft: sm.MambaLM | None, requests: list[sm.Request], tokens: int) -> list[list[int]]:
    """Texts of so many tokens, in two batches, a half of the requests each."""
    texts, width = [], len(requests) // 2
    for half in (requests[:width], requests[width:]):
        prompts = [request.prompt for request in half]
        result = sm.generate(target, prompts, draft=draft, max_new_tokens=tokens, stop_token_ids=())
        texts += [text.tolist()[PROMPT_TOKENS:] for text in result.sequences]
    return texts


def timed(run: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float, float]:
    """Texts, tokens per second, and per second of CPU time of the process."""
    began, cpu = time.perf_counter(), time.process_time()
    texts = run()
    tokens = sum(map(len, texts))
    return texts, tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


def bench_width(
    report: Report, name: str, widths: list[int], tokens: int, repeats: int, llama_server: Path | None, folder: Path
) -> None:
    target, draft, text = models_of(name)
    compared = llama_server is not None and name in SHAPES
    if compared:
        from . import llama_server as peer  # needs gguf

        file = peer.write_file(target, folder)
    for width in widths:
        requests = requests_of(text, 2 * width, tokens)
        longest = PROMPT_TOKENS + max(request.max_new_tokens for request in requests)
        mine, static, theirs = [], [], []
        with contextlib.ExitStack() as running:
            engine = running.enter_context(sm.Engine(target, draft=draft, max_batch_size=width))
            other = compared and running.enter_context(peer.running(llama_server, file, width, longest, PORT))
            for repeat in range(repeats + 1):
                progress(f"{name}: {width} rows, {'untimed' if not repeat else f'{repeat} of {repeats}'}")
                texts, *speeds = timed(lambda engine=engine, requests=requests: served(engine, requests))
                mine.append(speeds)
                expected, *speeds = timed(lambda requests=requests: batches(target, draft, requests, tokens))
                static.append(speeds)
                if other:
                    began = time.perf_counter()
                    theirs.append(sum(other.served(requests)) / (time.perf_counter() - began))
                for text_of_mine, known in zip(texts, expected, strict=True):
                    if text_of_mine[: len(known)] != known[: len(text_of_mine)]:
                        raise SystemExit(f"{name}, {width} rows: another text than that of generate; not timed")
        speed, per_cpu_s = map(statistics.median, zip(*mine[1:], strict=True))
        static_speed, static_per_cpu_s = map(statistics.median, zip(*static[1:], strict=True))
        report.add(
            op="engine", case=name, batch=width, tokens_per_s=speed, static=static_speed, ratio=speed / static_speed,
            cpu_ratio=per_cpu_s / static_per_cpu_s, median_s=1 / speed, baseline="static batches of as many rows",
            llama_cpp=statistics.median(theirs[1:]) if theirs else None,
        )  # fmt: skip


def bench_chat(report: Report, name: str, length: int) -> None:
    """From ``submit`` to the first token of a second turn."""
    target, draft, text = models_of(name)
    progress(f"{name}: a chat of {length} tokens")
    first_s, answers = {}, {}
    with sm.Engine(target, draft=draft, prefix_cache_bytes=2**30) as keeps, sm.Engine(target, draft=draft) as forgets:
        answer = keeps.submit(sm.Request(text[:length], 16, stop_token_ids=())).result().tokens
        second = sm.Request([*text[:length], *answer, *text[length : length + 20]], 16, stop_token_ids=())
        for engine in (keeps, forgets):
            began = time.perf_counter()
            completion = engine.submit(second)
            next(iter(completion))
            first_s[engine] = time.perf_counter() - began
            answers[engine] = completion.result()
        if answers[keeps].tokens != answers[forgets].tokens:
            raise SystemExit(f"{name}: the prefix cache changed a text; not timed")
        report.add(
            op="second turn", case=name, first_s=first_s[keeps], ratio=first_s[forgets] / first_s[keeps],
            cached_tokens=answers[keeps].cached_tokens, median_s=first_s[keeps], baseline="nothing kept",
        )  # fmt: skip


def draw(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len({row["case"] for row in rows}), figsize=(9, 3.6), squeeze=False)
    for axes, case in zip(all_axes[0], dict.fromkeys(row["case"] for row in rows), strict=True):
        points = [row for row in rows if row["case"] == case]
        widths = [row["batch"] for row in points]
        axes.plot(widths, [row["tokens_per_s"] for row in points], "ko-", label="engine, rows join and leave")
        axes.plot(widths, [row["static"] for row in points], "k:", label="static batch")
        if all(row.get("llama_cpp") for row in points):
            axes.plot(widths, [row["llama_cpp"] for row in points], "s--", color="tab:gray", label="llama.cpp's server")
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_xlabel("rows")
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0)
        axes.set_title("embedded pair, K = 4" if case == "embedded" else f"mamba-{case} shape, bf16, no draft")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    shapes = ("embedded", *SHAPES, *MAMBA2_SHAPES)
    arguments.add_argument("--models", nargs="*", default=["embedded", "130m"], choices=shapes)
    arguments.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS), help="rows of the engine")
    arguments.add_argument("--tokens", type=int, default=48, help="tokens of a request, on average")
    arguments.add_argument("--repeats", type=int, default=3, help="interleaved runs of each case; medians are shown")
    arguments.add_argument("--chat", type=int, default=8192, metavar="TOKENS", help="length of a chat; 0: none")
    arguments.add_argument("--llama_server", type=Path, metavar="PROGRAM", help="llama.cpp's, to run beside the engine")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="also draw the speeds, as PNG")
    options = arguments.parse_args()
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    columns = {"op": str, "case": str, "batch": str, "tokens_per_s": number, "static": number, "llama_cpp": number}
    report = Report({**columns, "ratio": number, "cpu_ratio": number, "first_s": seconds, "cached_tokens": str})
    for name in options.models if options.widths else ():
        with tempfile.TemporaryDirectory(prefix="serve-") as folder:
            sizes = options.widths, options.tokens, options.repeats
            bench_width(report, name, *sizes, options.llama_server, Path(folder))
    if options.plot is not None:
        draw([row for row in report.rows if row["op"] == "engine"], options.plot)
    for name in options.models if options.chat else ():
        bench_chat(report, name, options.chat)
    report.write(options.json)


if __name__ == "__main__":
    main()
