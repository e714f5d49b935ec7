"""Times whole runs: plain decoding against speculation, on the shapes of published models and on the embedded pair.

python -m benchmarks.decode [--models 130m 370m] [--draft 130m] [--rates 0.7 0.8] [--tokens 48] [--json FILE]

Weights of the published shapes are random bf16, the draft's tokens are scripted to be right at a stated rate, and for
every drafted token a real model runs, so that its cost is in the figure: the one that --draft names, or the small model
that is published with the same tokens, or one of at most 1/20 of the target's bytes (a Mamba, for a hybrid a Llama).
"hybrid" is half of the layers of Llama 3 8B, three of four with Mamba-2 instead of attention. The clock covers decoding
of one row after prefill. share_state is the part of the time of plain decoding, its steps not recorded, that is spent
in the ops that carry state; share_outside_kernels the part that is not spent in kernels at all: Python, and what the
host books. The executor keeps rounds, so that they were recorded in an earlier call. Text is checked to equal plain
decoding before any time is printed.
"""

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator

import torch

import speculative_mamba as sm
from speculative_mamba.cli.generate import PROMPT
from speculative_mamba.decode import ModelDrafter, round
from speculative_mamba.layers import attention, mamba1, mamba1_grouped, mamba2, short_conv
from speculative_mamba.models.config import AttentionConfig, MlpConfig, ModelConfig, mamba1_config
from speculative_mamba.ops.backend import extension
from speculative_mamba.ops.recording import Recording
from speculative_mamba.testing.hybrids import DRAFTS, HYBRIDS
from speculative_mamba.testing.models import MAMBA2_SHAPES, SHAPES, published_config, random_model
from speculative_mamba.testing.scripted import CapturableScript, agree_at_rate

from .report import Report, number, parser, progress, share

RATES = (0.6, 0.7, 0.8, 0.9)
LOOKAHEAD = 4
PROMPT_TOKENS = 32
ALL_SHAPES = (*SHAPES, *MAMBA2_SHAPES, *HYBRIDS, "hybrid")
DEFAULT_SHAPES = (*SHAPES, "mamba2-130m", "mamba2-370m", "mamba2-2.7b", "hybrid")
# Where each op that carries state is called from.
STATEFUL = [
    (module, name)
    for module in (attention, mamba1, mamba1_grouped, mamba2, short_conv)
    for name in vars(module)
    if name.endswith("_verify")
]


def draft_config(target: sm.MambaLM) -> ModelConfig:
    """Two layers, as wide as 1/20 of the target's bytes allows; of a hybrid's draft they are a Llama's."""
    budget, vocabulary = target.weight_bytes // 20, target.vocab_size
    width = 16
    while 2 * (vocabulary * (width + 16) + 2 * 16 * (width + 16) ** 2) <= budget:
        width += 16
    if not any(isinstance(mixer, AttentionConfig) for mixers in target.config.mixers for mixer in mixers):
        return mamba1_config(width, 2, vocabulary)
    layer = AttentionConfig(width // 16, width // 16, 16, (1.0, 0.1)), MlpConfig(4 * width)
    return ModelConfig(width, vocabulary, layer * 2)


@contextlib.contextmanager
def stateful_ops_timed(target: sm.MambaLM) -> Iterator[list[float]]:
    """Collects the seconds of every call of an op that carries state; nothing is recorded meanwhile."""
    spent: list[float] = []
    recorded, round._recorded_parts = round._recorded_parts, lambda *_: None
    target.new_cache = lambda *sizes: list(type(target).new_cache(target, *sizes))
    originals = {(module, name): getattr(module, name) for module, name in STATEFUL}

    def timed(function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent.append(time.perf_counter() - started)
            return result

        return call

    for (module, name), function in originals.items():
        setattr(module, name, timed(function))
    try:
        yield spent
    finally:
        del target.new_cache
        round._recorded_parts = recorded
        for (module, name), function in originals.items():
            setattr(module, name, function)


@contextlib.contextmanager
def kernels_timed() -> Iterator[list[float]]:
    """Collects the seconds of the kernels of every round that is recorded."""
    spent: list[float] = []
    program = extension()[0].Program
    run_kernels, run = program.run, Recording.run
    kernels = 0.0

    def timed_kernels(self: object, where: int) -> None:
        nonlocal kernels
        started = time.perf_counter()
        run_kernels(self, where)
        kernels += time.perf_counter() - started

    def timed(self: Recording, **options: bool) -> None:
        nonlocal kernels
        kernels = 0.0
        run(self, **options)
        spent.append(kernels)

    program.run, Recording.run = timed_kernels, timed
    try:
        yield spent
    finally:
        program.run, Recording.run = run_kernels, run


def share_outside_kernels(target: sm.MambaLM, prompt: list, settings: dict) -> float:
    """The part of plain decoding's time that is not spent in kernels, of several calls in the middle. The executor
    among the settings keeps rounds. prompt: of one token, as kernels that read a longer one would count."""
    sm.generate(target, prompt, **settings | {"max_new_tokens": 2})
    shares = []
    with kernels_timed() as spent:
        for _ in range(5):
            spent.clear()
            stats = sm.generate(target, prompt, **settings).stats
            shares.append(1 - sum(spent) / stats.decode_s)
    return statistics.median(shares)


def bench_shape(
    report: Report, name: str, draft_name: str | None, rates: Iterable[float], tokens: int, repeats: int
) -> None:
    progress(f"drawing the weights of {name} and its draft")
    draft_name = draft_name or DRAFTS.get(name)
    target = random_model(published_config(name), dtype=torch.bfloat16)
    config = draft_config(target) if draft_name is None else published_config(draft_name)
    cost = random_model(config, dtype=torch.bfloat16, seed=1)
    assert draft_name is not None or cost.weight_bytes * 20 <= target.weight_bytes
    prompt = torch.randint(0, target.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    settings = {"lookahead": LOOKAHEAD, "max_new_tokens": tokens, "stop_token_ids": ()}

    sm.generate(target, prompt, **settings | {"max_new_tokens": 2})
    with stateful_ops_timed(target) as spent:
        sm.generate(target, prompt[:, -1:], **settings | {"max_new_tokens": 2})  # the prompt has no prefill
        spent.clear()
        plain = sm.generate(target, prompt[:, -1:], **settings)
    state_share = sum(spent) / plain.stats.decode_s
    settings["executor"] = sm.EagerExecutor()
    outside = share_outside_kernels(target, prompt[:, -1:], settings)

    runs: dict[float | None, list[sm.GenerationStats]] = {rate: [] for rate in (None, *rates)}
    for repeat in range(repeats):
        progress(f"{name}: plain and with every draft, {repeat + 1} of {repeats}")
        plain = sm.generate(target, prompt, **settings)
        runs[None].append(plain.stats)
        text = plain.sequences[0].tolist()
        for rate in rates:
            draft = CapturableScript([text], target.vocab_size, agree_at_rate(rate, repeat), cost=ModelDrafter(cost))
            result = sm.generate(target, prompt, draft=draft, **settings)
            if result.sequences[0].tolist() != text:
                raise SystemExit(f"{name}: text differs from plain decoding; not timed")
            runs[rate].append(result.stats)
    plain_speed = statistics.median(s.tokens_per_s for s in runs.pop(None))
    _add(report, f"{name} plain", target, plain_speed, plain_speed, None, 1.0, state_share, outside)
    for rate, stats in runs.items():
        speed = statistics.median(s.tokens_per_s for s in stats)
        rounds = statistics.mean(s.tokens_per_round for s in stats)
        measured = sum(s.accepted for s in stats) / sum(s.tested for s in stats)
        _add(report, f"{name} scripted {rate}", target, speed, plain_speed, measured, rounds)


def bench_embedded(report: Report, tokens: int) -> None:
    target, draft = sm.load_model("builtin:target"), sm.load_model("builtin:draft")
    prompt = [target.tokenizer.encode(PROMPT).ids]
    settings = {"lookahead": LOOKAHEAD, "max_new_tokens": tokens, "executor": sm.EagerExecutor()}
    sm.generate(target, prompt, **settings)
    sm.generate(target, prompt, draft=draft, **settings)
    plain, speculative = [], []
    progress("embedded pair")
    for _ in range(9):
        plain.append(sm.generate(target, prompt, **settings))
        speculative.append(sm.generate(target, prompt, draft=draft, **settings))
    if not torch.equal(plain[0].sequences[0], speculative[0].sequences[0]):
        raise SystemExit("embedded pair: text differs from plain decoding; not timed")
    plain_speed = statistics.median(run.stats.tokens_per_s for run in plain)
    outside = share_outside_kernels(target, [prompt[0][-1:]], settings)
    stats = speculative[0].stats
    speed = statistics.median(run.stats.tokens_per_s for run in speculative)
    _add(report, "embedded pair plain", target, plain_speed, plain_speed, None, 1.0, None, outside)
    _add(report, "embedded pair", target, speed, plain_speed, stats.acceptance_rate, stats.tokens_per_round)


def _add(
    report: Report,
    case: str,
    target: sm.MambaLM,
    speed: float,
    plain_speed: float,
    acceptance: float | None,
    tokens_per_round: float,
    state_share: float | None = None,
    outside: float | None = None,
) -> None:
    """gb_per_s: bytes of target weights read per second, once for every round."""
    gb_per_s = speed / tokens_per_round * target.weight_bytes / 1e9
    report.add(
        op="generate", case=case, backend="cpu", shape=f"{target.config.d_model}x{len(target.blocks)}",
        dtype=str(target.embedding.dtype).removeprefix("torch."), batch=1, tokens=LOOKAHEAD + 1 if acceptance else 1,
        median_s=1 / speed, tokens_per_s=speed, acceptance=acceptance, tokens_per_round=tokens_per_round,
        gb_per_s=gb_per_s, share_of_bandwidth=gb_per_s / report.bandwidth, share_state=state_share,
        share_outside_kernels=outside,
        baseline="plain decoding", ratio=speed / plain_speed,
    )  # fmt: skip


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument(
        "--models", nargs="*", default=DEFAULT_SHAPES, choices=ALL_SHAPES, help="whose shapes to run"
    )
    arguments.add_argument(
        "--draft", choices=ALL_SHAPES, help="shape of the draft, instead of the published one or 1/20 of the bytes"
    )
    arguments.add_argument("--rates", type=float, nargs="*", default=RATES, help="how often scripted tokens are right")
    arguments.add_argument("--tokens", type=int, default=48, help="tokens per run")
    arguments.add_argument("--repeats", type=int, default=3, help="interleaved runs of each case; medians are shown")
    options = arguments.parse_args()
    report = Report(
        {
            "case": str, "tokens_per_s": number, "ratio": number, "acceptance": number, "tokens_per_round": number,
            "gb_per_s": number, "share_of_bandwidth": share, "share_state": share,
            "share_outside_kernels": share,
        }
    )  # fmt: skip
    bench_embedded(report, 256)
    for name in options.models:
        bench_shape(report, name, options.draft, options.rates, options.tokens, options.repeats)
    report.write(options.json)


if __name__ == "__main__":
    main()
