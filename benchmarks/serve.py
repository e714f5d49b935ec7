"""Times an engine against its width, and the second turn of a chat with and without the prefix cache.

python -m benchmarks.serve [--models embedded 130m] [--widths 1 2 4 8 16 32 64] [--chat 8192] [--plot FILE]

Twice as many requests as there are rows arrive at once, so that half of them join while others run. Their prompts have
32 tokens, their budgets are 0.75, 1 and 1.25 times --tokens. "embedded" is the embedded pair on text that it has not
seen, four tokens drafted; the published shapes have random bf16 weights and no draft. static is ``generate`` with as
many rows of one budget, which takes turns with the engine. Prompts are in the figures. Every text of the engine is
compared with the one that ``generate`` gives before a time is printed. Under many clients: ``benchmarks.serve_load``.
A chat's first turn has as many tokens as --chat says, the second 20 more. first_s is the time from ``submit`` to the
first token of the second turn; ratio, the same without a prefix cache over it.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import MAMBA2_SHAPES, SHAPES, published_config, random_model

from .report import Report, number, parser, progress, seconds

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
PROMPT_TOKENS = 32
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


def served(engine: sm.Engine, requests: list[sm.Request]) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the texts."""
    began = time.perf_counter()
    completions = [engine.submit(request) for request in requests]
    texts = [completion.result().tokens for completion in completions]
    return sum(map(len, texts)) / (time.perf_counter() - began), texts


def bench_width(report: Report, name: str, widths: list[int], tokens: int, repeats: int) -> None:
    target, draft, text = models_of(name)
    for width in widths:
        requests = requests_of(text, 2 * width, tokens)
        prompts = [request.prompt for request in requests]
        speeds: dict[str, list[float]] = {"engine": [], "static": []}
        with sm.Engine(target, draft=draft, max_batch_size=width) as engine:
            for repeat in range(repeats + 1):
                progress(f"{name}: {width} rows, {'untimed' if not repeat else f'{repeat} of {repeats}'}")
                speed, texts = served(engine, requests)
                speeds["engine"].append(speed)
                began, expected = time.perf_counter(), []
                for at in (0, width):
                    result = sm.generate(
                        target, prompts[at : at + width], draft=draft, max_new_tokens=tokens, stop_token_ids=()
                    )
                    expected += [sequence.tolist()[PROMPT_TOKENS:] for sequence in result.sequences]
                speeds["static"].append(2 * width * tokens / (time.perf_counter() - began))
                for mine, other in zip(texts, expected, strict=True):
                    if mine[: len(other)] != other[: len(mine)]:
                        raise SystemExit(f"{name}, {width} rows: another text than that of generate; not timed")
        engine_speed, static = (statistics.median(values[1:]) for values in speeds.values())
        report.add(
            op="engine", case=name, batch=width, tokens_per_s=engine_speed, static=static, ratio=engine_speed / static,
            median_s=1 / engine_speed, baseline="one static batch of as many rows",
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
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="also draw the speeds, as PNG")
    options = arguments.parse_args()
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    columns = {"op": str, "case": str, "batch": str, "tokens_per_s": number, "static": number}
    report = Report({**columns, "ratio": number, "first_s": seconds, "cached_tokens": str})
    for name in options.models if options.widths else ():
        bench_width(report, name, options.widths, options.tokens, options.repeats)
    if options.plot is not None:
        draw([row for row in report.rows if row["op"] == "engine"], options.plot)
    for name in options.models if options.chat else ():
        bench_chat(report, name, options.chat)
    report.write(options.json)


if __name__ == "__main__":
    main()
