"""Times one model shape against acceptance rate and K, tokens per pass, and batch; draws the curves.

python -m benchmarks.sweep [--model 130m] [--tokens 256] [--plots FOLDER] [--json FILE]

Weights are random bf16; drafts are scripted, with the cost of a real model of at most 1/20 of the target's bytes. The
clock of the first sweep covers decoding of one row after prefill, plain and for every K in turn; that of the others one
pass of the target. Drawing needs matplotlib (pip install speculative-mamba[bench]).
"""

import statistics
import sys
from pathlib import Path

import torch

import speculative_mamba as sm
from speculative_mamba.decode import ModelDrafter
from speculative_mamba.testing.models import SHAPES, published_config, random_model
from speculative_mamba.testing.scripted import CapturableScript, agree_at_rate
from speculative_mamba.testing.timing import interleaved_medians

from .decode import PROMPT_TOKENS, draft_config
from .report import Report, number, parser, progress, seconds

RATES = (0.3, 0.5, 0.65, 0.8, 0.9, 0.95)
LOOKAHEADS = (1, 2, 3, 4, 5, 7, 9, "auto")
PASSES = tuple(range(1, 17))
BATCHES = (1, 2, 4, 8, 16)


def sweep_lookahead(report: Report, target: sm.MambaLM, tokens: int, repeats: int) -> None:
    cost = random_model(draft_config(target), dtype=torch.bfloat16, seed=1)
    prompt = torch.randint(0, target.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": tokens, "stop_token_ids": ()}
    text = sm.generate(target, prompt, **settings).sequences[0].tolist()
    for rate in RATES:
        speeds: dict[int | str, list[float]] = {}
        for repeat in range(repeats):
            progress(f"acceptance {rate}, every K in turn, {repeat + 1} of {repeats}")
            for lookahead in (0, *LOOKAHEADS):
                draft = CapturableScript(
                    [text], target.vocab_size, agree_at_rate(rate, repeat), cost=ModelDrafter(cost)
                )
                options = {"draft": draft, "lookahead": lookahead} if lookahead else {}
                result = sm.generate(target, prompt, **options, **settings)
                if result.sequences[0].tolist() != text:
                    raise SystemExit("text differs from plain decoding; not timed")
                speeds.setdefault(lookahead, []).append(result.stats.tokens_per_s)
        medians = {lookahead: statistics.median(values) for lookahead, values in speeds.items()}
        best = max(medians[k] for k in LOOKAHEADS if k != "auto")
        for lookahead, speed in medians.items():
            report.add(
                op="generate", backend="cpu", dtype="bfloat16", batch=1, acceptance=rate, K=lookahead,
                median_s=1 / speed, tokens_per_s=speed, ratio=speed / medians[0], of_best=speed / best,
                baseline="plain decoding",
            )  # fmt: skip


def sweep_passes(report: Report, target: sm.MambaLM) -> None:
    for op, cases in (("tokens", [(1, tokens) for tokens in PASSES]), ("batch", [(batch, 5) for batch in BATCHES])):
        progress(f"one pass against {op}")
        functions = {}
        for batch, tokens in cases:
            cache, start = target.new_cache(batch, tokens), torch.zeros(batch, dtype=torch.int32)
            ids = torch.randint(0, target.vocab_size, (batch, tokens))
            functions[batch, tokens] = lambda ids=ids, cache=cache, start=start: target.verify(ids, cache, start)
        times = interleaved_medians(functions, rounds=7)
        for (batch, tokens), median in times.items():
            report.add(
                op=f"verify against {op}", backend="cpu", dtype="bfloat16", batch=batch, tokens=tokens,
                median_s=median, tokens_per_s=batch * tokens / median, ratio=times[cases[0]] / median,
                baseline=f"batch {cases[0][0]}, {cases[0][1]} tokens",
            )  # fmt: skip


def draw(rows: list[dict], model: str, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)

    def figure(name: str, x_label: str, y_label: str, title: str) -> None:
        pyplot.xlabel(x_label)
        pyplot.ylabel(y_label)
        pyplot.title(title)
        pyplot.grid(alpha=0.3)
        pyplot.ylim(bottom=0)
        pyplot.tight_layout()
        pyplot.savefig(folder / f"{name}.png", dpi=110)
        pyplot.close()
        print(f"wrote {folder / name}.png")

    pyplot.figure(figsize=(6.4, 4))
    runs = [row for row in rows if row["op"] == "generate"]
    for lookahead in (0, *LOOKAHEADS):
        points = [(row["acceptance"], row["tokens_per_s"]) for row in runs if row["K"] == lookahead]
        style = {0: "k--", "auto": "k-"}.get(lookahead, "-")
        label = {0: "plain", "auto": "K auto"}.get(lookahead, f"K {lookahead}")
        pyplot.plot(*zip(*points, strict=True), style, label=label, linewidth=2 if lookahead == "auto" else 1.2)
    pyplot.legend(fontsize=8)
    figure("lookahead", "acceptance rate", "tokens per second", f"mamba-{model} shape, bf16, one row")
    for op, x in (("tokens", "tokens"), ("batch", "batch")):
        points = [(row[x], row["median_s"] * 1e3) for row in rows if row["op"] == f"verify against {op}"]
        pyplot.figure(figsize=(6.4, 4))
        pyplot.plot(*zip(*points, strict=True), "ko-")
        what = "tokens in one pass, one row" if op == "tokens" else "rows, five tokens each"
        figure(op, what, "milliseconds", f"One pass of the mamba-{model} shape, bf16")


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--model", default="130m", choices=SHAPES, help="whose shape to run")
    arguments.add_argument("--tokens", type=int, default=256, help="tokens per run")
    arguments.add_argument("--repeats", type=int, default=2, help="interleaved runs of each case; medians are shown")
    arguments.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw the curves as PNG")
    options = arguments.parse_args()
    if options.plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            sys.exit("--plots needs matplotlib: pip install matplotlib")
    target = random_model(published_config(options.model), dtype=torch.bfloat16)
    columns = {"op": str, "acceptance": number, "K": str, "batch": str, "tokens": str}
    report = Report({**columns, "median_s": seconds, "tokens_per_s": number, "ratio": number, "of_best": number})
    sweep_passes(report, target)
    sweep_lookahead(report, target, options.tokens, options.repeats)
    report.write(options.json)
    if options.plots is not None:
        draw(report.rows, options.model, options.plots)


if __name__ == "__main__":
    main()
