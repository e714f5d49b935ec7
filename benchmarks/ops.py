"""Times every op on the shapes of published models, against PyTorch in the same run.

python -m benchmarks.ops [--models 130m 2.8b] [--ops skinny_linear expert_linear] [--json FILE]

Each case is checked against the reference before it is timed. gb_per_s counts the bytes an op must move once;
share_of_bandwidth is against a read of memory that takes turns with the case; ratio is the baseline's time over ours.
All are medians of interleaved runs.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F

from speculative_mamba.models.config import ExpertsConfig, ModelConfig
from speculative_mamba.models.sources import QUANTIZED
from speculative_mamba.ops import (
    attention_verify,
    causal_conv1d_verify,
    expert_linear,
    huge_pages,
    rms_norm,
    sample_tokens,
    selective_scan_verify,
    skinny_linear,
    speculative_accept,
    ssd_verify,
)
from speculative_mamba.ops.block_weight import BlockWeight, can_quantize, quantized
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.ops.noise import Purpose
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors
from speculative_mamba.testing.models import SHAPES, published_config
from speculative_mamba.testing.timing import MemoryReader, interleaved_medians, rotate

from .report import Report, number, parser, progress, seconds, share

OPS = (
    "skinny_linear", "expert_linear", "speculative_accept", "ssd_verify", "attention_verify", "rms_norm",
    "causal_conv1d_verify", "selective_scan_verify",
)  # fmt: skip
TOKENS = (1, 5)
CACHE_BYTES = 2**30  # weights used in turn must not fit into any cache


memory_reader = cache(MemoryReader)


def in_turns(functions: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each, and of a read of memory under "memory"."""
    return interleaved_medians({**functions, "memory": memory_reader()}, rounds)


def check(op: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """A failing check prints no time."""
    error = (actual - expected).abs().max().item() / expected.abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"{op}: relative error {error:.2e} against the reference; not timed")
    progress(f"timing {op}, which is right")


def bench_linear(report: Report, in_features: int, out_features: int, rows_list: tuple[int, ...] = TOKENS) -> None:
    progress(f"drawing weights of {out_features}x{in_features}")
    size = in_features * out_features * 2
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).bfloat16()
    weights = [weight.clone() for _ in range(min(200, CACHE_BYTES // size))]
    wide = [weight.float() for _ in weights[::2]]
    next_weight, next_again, next_wide = rotate(weights), rotate(weights), rotate(wide)
    for rows in rows_list:
        x = torch.randn(rows, in_features)
        x16 = x.bfloat16()
        check("skinny_linear", skinny_linear(x, weights[0]), F.linear(x, weights[0].float()))
        times = in_turns(
            {
                "ours": lambda x=x: skinny_linear(x, next_weight()),
                "F.linear bf16": lambda x=x16: F.linear(x, next_again()),
                "F.linear fp32": lambda x=x: F.linear(x, next_wide()),
            }
        )
        for baseline in ("F.linear bf16", "F.linear fp32"):
            _add(report, "skinny_linear", f"{out_features}x{in_features}", times, size, baseline, rows=rows)


def bench_blocks(report: Report, in_features: int, out_features: int, rows_list: tuple[int, ...] = TOKENS) -> None:
    """Weights in blocks against our own bf16, where there are full ones."""
    if not can_quantize(in_features):
        return
    progress(f"drawing weights in blocks of {out_features}x{in_features}")
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    wide = weight.bfloat16()
    next_wide = rotate([wide.clone() for _ in range(min(200, CACHE_BYTES // wide.nbytes))])
    for format in QUANTIZED:
        narrow = quantized(weight, format)
        copies = (huge_pages.copy(narrow.data, torch.uint8) for _ in range(min(400, CACHE_BYTES // narrow.nbytes)))
        next_narrow = rotate([BlockWeight(data, format, narrow.shape) for data in copies])
        for rows in rows_list:
            x = torch.randn(rows, in_features)
            check(f"skinny_linear {format}", skinny_linear(x, narrow), skinny_linear(x, narrow, backend="reference"))
            times = in_turns(
                {
                    "ours": lambda x=x, weight=next_narrow: skinny_linear(x, weight()),
                    "bf16": lambda x=x: skinny_linear(x, next_wide()),
                }
            )
            shape = f"{out_features}x{in_features}"
            _add(report, "skinny_linear", shape, times, narrow.nbytes, "bf16", format, rows=rows)


def bench_experts(report: Report, config: ExpertsConfig, d_model: int) -> None:
    """gate (or up) and down projections of one layer, for tokens that choose at random, at each call anew: bytes are
    those of the experts chosen, on average. The baseline is a product in PyTorch for every expert with its tokens, as
    transformers has it."""
    count, size = config.num_experts, config.num_experts * config.d_inner * d_model * 2
    layers = max(2, min(50, CACHE_BYTES // size))
    for name, (out_features, in_features) in {
        "up": (config.d_inner, d_model), "down": (d_model, config.d_inner),
    }.items():  # fmt: skip
        progress(f"drawing {layers} x {count} experts of {out_features}x{in_features}")
        whole = (torch.randn(count, out_features, in_features) * in_features**-0.5).bfloat16()
        weights = [whole.clone() for _ in range(layers)]
        experts_of = [ExpertWeight(tuple(weight)) for weight in weights]
        for tokens in (1, 2, 3, 5, 8):
            choices = torch.rand(4 * layers + 1, tokens, count).argsort(-1)[..., : config.top_k].int().contiguous()
            x = torch.randn(tokens, 1 if name == "up" else config.top_k, in_features)
            sums = torch.rand(tokens, config.top_k) if name == "down" else None

            def theirs(experts: torch.Tensor, weight: torch.Tensor, x=x) -> torch.Tensor:
                y = x.new_empty(*experts.shape, weight.shape[1])
                for expert in experts.unique():
                    token, choice = torch.where(experts == expert)
                    rows = x[token, choice if x.shape[1] > 1 else 0].bfloat16()
                    y[token, choice] = F.linear(rows, weight[expert]).float()
                return y

            exact = expert_linear(x, choices[0], sums, experts_of[0], backend="reference")
            check("expert_linear", expert_linear(x, choices[0], sums, experts_of[0]), exact)
            mine, again = (rotate(choices.unbind()), rotate(experts_of)), (rotate(choices.unbind()), rotate(weights))
            times = in_turns(
                {
                    "ours": lambda x=x, sums=sums, mine=mine: expert_linear(x, mine[0](), sums, mine[1]()),
                    "F.linear per expert": lambda theirs=theirs, again=again: theirs(again[0](), again[1]()),
                },
                rounds=25,
            )
            shape = f"{config.top_k}/{count}x{out_features}x{in_features}"
            chosen = sum(len(experts.unique()) for experts in choices) / len(choices)
            moved = round(chosen * out_features * in_features * 2)
            _add(report, "expert_linear", shape, times, moved, "F.linear per expert", tokens=tokens)


def bench_expert_blocks(report: Report, config: ExpertsConfig, d_model: int) -> None:
    """Experts of an up projection in blocks against our own bf16, if their rows are made of full ones."""
    if not can_quantize(d_model):
        return
    count, N, K = config.num_experts, config.d_inner, d_model
    progress(f"drawing {count} experts of {N}x{K} in blocks")
    whole = (torch.randn(count, N, K) * K**-0.5).bfloat16()
    layers = max(2, min(50, CACHE_BYTES // whole.nbytes))
    wide = [ExpertWeight(tuple(whole.clone())) for _ in range(layers)]
    for format in QUANTIZED:
        blocks = [quantized(matrix, format) for matrix in whole]
        narrow = [
            ExpertWeight.of_blocks([BlockWeight(huge_pages.copy(b.data, torch.uint8), format, b.shape) for b in blocks])
            for _ in range(2 * layers)
        ]
        for tokens in TOKENS:
            choices = torch.rand(4 * layers + 1, tokens, count).argsort(-1)[..., : config.top_k].int().contiguous()
            x = torch.randn(tokens, 1, K)
            exact = expert_linear(x, choices[0], None, narrow[0], backend="reference")
            check(f"expert_linear {format}", expert_linear(x, choices[0], None, narrow[0]), exact)

            def turns(weights: list[ExpertWeight], x=x, choices=choices) -> Callable[[], torch.Tensor]:
                next_choice, next_weight = rotate(choices.unbind()), rotate(weights)
                return lambda: expert_linear(x, next_choice(), None, next_weight())

            times = in_turns({"ours": turns(narrow), "bf16": turns(wide)}, rounds=25)
            chosen = sum(len(experts.unique()) for experts in choices) / len(choices)
            shape = f"{config.top_k}/{count}x{N}x{K}"
            _add(report, "expert_linear", shape, times, round(chosen * blocks[0].nbytes), "bf16", format, tokens=tokens)


def bench_norm(report: Report, config: ModelConfig) -> None:
    weight = torch.randn(config.d_model).bfloat16()
    for rows in TOKENS:
        x, residual = torch.randn(rows, config.d_model), torch.randn(rows, config.d_model)

        def torch_norm(x: torch.Tensor = x, residual: torch.Tensor = residual) -> torch.Tensor:
            return F.rms_norm(x + residual, (config.d_model,), weight.float(), 1e-5)

        def ours(x: torch.Tensor = x, residual: torch.Tensor = residual) -> torch.Tensor:
            return rms_norm(x, weight, residual)[0]

        check("rms_norm", ours(), torch_norm())
        times = in_turns({"ours": ours, "torch": torch_norm})
        _add(report, "rms_norm", f"{config.d_model}", times, 16 * x.numel(), "torch", rows=rows)


def bench_conv(report: Report, config: ModelConfig) -> None:
    D, W = config.blocks[0].d_inner, config.blocks[0].d_conv
    weight, bias = torch.randn(W, D).bfloat16().t(), torch.randn(D)
    start = torch.zeros(1, dtype=torch.int32)
    for tokens in TOKENS:
        x, window = torch.randn(1, tokens, D), torch.randn(1, W - 1 + tokens, D)

        def run(backend: str, x: torch.Tensor = x, window: torch.Tensor = window) -> torch.Tensor:
            return causal_conv1d_verify(x, weight, bias, window, start, backend=backend)

        # The call moves the history it reads, so each check starts from the same window.
        check("causal_conv1d_verify", run("auto", window=window.clone()), run("reference", window=window.clone()))
        times = in_turns({"ours": lambda run=run: run("auto"), "reference": lambda run=run: run("reference")})
        moved = 4 * D * (3 * tokens + 2 * (W - 1))
        _add(report, "causal_conv1d_verify", f"{D}x{W}", times, moved, "reference", tokens=tokens)


def bench_scan(report: Report, config: ModelConfig) -> None:
    D, N = config.blocks[0].d_inner, config.blocks[0].d_state
    A, skip, dt_bias = -torch.rand(D, N) * N, torch.randn(D), torch.randn(D) - 4
    start = torch.zeros(1, dtype=torch.int32)
    layers = max(2, min(32, CACHE_BYTES // (4 * D * N * max(TOKENS))))
    for tokens in TOKENS:
        x, dt, z = (torch.randn(1, tokens, D) for _ in range(3))
        B, C = torch.randn(1, tokens, N), torch.randn(1, tokens, N)
        states = [torch.randn(1, tokens, D, N) for _ in range(layers)]
        mine, theirs = rotate(states), rotate(states)

        def run(
            backend: str, states: torch.Tensor, inputs: tuple[torch.Tensor, ...] = (x, dt, B, C, z)
        ) -> torch.Tensor:
            x, dt, B, C, z = inputs
            return selective_scan_verify(x, dt, A, B, C, skip, z, dt_bias, states, start, backend=backend)

        check("selective_scan_verify", run("auto", states[0].clone()), run("reference", states[0].clone()))
        times = in_turns(
            {
                "ours": lambda run=run, mine=mine: run("auto", mine()),
                "reference": lambda run=run, theirs=theirs: run("reference", theirs()),
            }
        )
        moved = 4 * (D * N * (tokens + 2) + 4 * D * tokens)
        _add(report, "selective_scan_verify", f"{D}x{N}", times, moved, "reference", "float32", tokens=tokens)


def bench_ssd(report: Report, config: ModelConfig) -> None:
    H, P, N = config.blocks[0].n_heads, config.blocks[0].head_dim, config.blocks[0].d_state
    A, skip, dt_bias = -torch.rand(H) * 16, torch.randn(H), torch.randn(H) - 4
    start = torch.zeros(1, dtype=torch.int32)
    layers = max(2, min(32, CACHE_BYTES // (4 * H * P * N * max(TOKENS))))
    for tokens in TOKENS:
        x, dt = torch.randn(1, tokens, H, P), torch.randn(1, tokens, H)
        B, C = torch.randn(1, tokens, 1, N), torch.randn(1, tokens, 1, N)
        states = [torch.randn(1, tokens, H, P, N) for _ in range(layers)]
        mine, theirs = rotate(states), rotate(states)

        def run(backend: str, states: torch.Tensor, inputs: tuple[torch.Tensor, ...] = (x, dt, B, C)) -> torch.Tensor:
            x, dt, B, C = inputs
            return ssd_verify(x, dt, A, B, C, skip, dt_bias, states, start, backend=backend)

        check("ssd_verify", run("auto", states[0].clone()), run("reference", states[0].clone()))
        times = in_turns(
            {
                "ours": lambda run=run, mine=mine: run("auto", mine()),
                "reference": lambda run=run, theirs=theirs: run("reference", theirs()),
            },
            rounds=9,
        )
        moved = 4 * (H * P * N * (tokens + 1) + 2 * H * P * tokens)
        _add(report, "ssd_verify", f"{H}x{P}x{N}", times, moved, "reference", "float32", tokens=tokens)


def bench_attention(report: Report, heads: int, kv_heads: int, dims: int) -> None:
    """After 512 and 4,096 entries, against PyTorch's own attention on the same keys and values."""
    start, group = torch.zeros(1, dtype=torch.int32), heads // kv_heads
    for context in (512, 4096):
        kept = [torch.randn(2, 1, kv_heads, context + 16, dims) for _ in range(max(2, 2**26 // (context * dims * 8)))]
        for tokens in TOKENS:
            q, k, v = (torch.randn(1, tokens, count, dims) for count in (heads, kv_heads, kv_heads))
            lengths = torch.full((1, tokens), context, dtype=torch.int32)
            future = torch.ones(tokens, context + tokens, dtype=torch.bool).tril(context)

            def ours(kept: list, q=q, k=k, v=v, lengths=lengths, context=context) -> torch.Tensor:
                return attention_verify(q, k, v, *kept, lengths.fill_(context), start)

            def torchs(kept: list, q=q, k=k, v=v, future=future, tokens=tokens, context=context) -> torch.Tensor:
                keys, values = kept
                for entries, new in ((keys, k), (values, v)):
                    entries[:, :, context : context + tokens] = new.transpose(1, 2)
                keys, values = (entries[:, :, : context + tokens] for entries in (keys, values))
                y = F.scaled_dot_product_attention(
                    q.transpose(1, 2), keys, values, attn_mask=future, enable_gqa=group > 1
                )
                return y.transpose(1, 2)

            check("attention_verify", ours(kept[0]), torchs(kept[0]))
            mine, theirs = rotate(kept), rotate(kept)
            times = in_turns(
                {"ours": lambda ours=ours, mine=mine: ours(mine()), "torch": lambda f=torchs, t=theirs: f(t())}
            )
            moved = 8 * kv_heads * dims * (context + tokens)
            shape = f"{heads}/{kv_heads}x{dims}@{context}"
            _add(report, "attention_verify", shape, times, moved, "torch", "float32", tokens=tokens)


def torch_probs(logits: torch.Tensor, f: SamplingParams) -> torch.Tensor:
    """Filtered probabilities (T, V) in PyTorch's operations: only the k largest are ever sorted."""
    kept, ids = (logits / f.temperature).topk(f.top_k or logits.shape[-1], -1)
    probs = torch.softmax(kept, -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= f.top_p, 0)
    return torch.zeros_like(logits).scatter_(-1, ids, probs / probs.sum(-1, keepdim=True))


def torch_accept(
    logits: torch.Tensor, drafted: torch.Tensor, draft_probs: torch.Tensor, f: SamplingParams
) -> tuple[int, int]:
    """The same test in PyTorch's operations, for one row."""
    probs = torch_probs(logits[0], f)
    q, tokens = draft_probs[0], drafted[0, :, None]
    kept = torch.rand(len(q)) * q.gather(1, tokens)[:, 0] < probs[:-1].gather(1, tokens)[:, 0]
    accepted = int(kept.long().cumprod(0).sum())
    rest = probs[-1] if accepted == len(q) else (probs[accepted] - q[accepted]).clamp_(min=0)
    return accepted, int(torch.multinomial(rest, 1))


def bench_accept(report: Report, vocabulary: int = 50280, lookahead: int = 4) -> None:
    """A window whose draft is the target itself, so that every position is looked at."""
    positions, keys = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    logits = 3 * torch.randn(1, lookahead + 1, vocabulary)
    for name, f in {
        "top-k 50, top-p 0.8": SamplingParams(0.8, 50, 0.8),
        "top-p 0.9": SamplingParams(0.8, 0, 0.9),
        "no filter": SamplingParams(1.0),
        "greedy": SamplingParams(),
    }.items():
        draft_probs = torch.empty(1, lookahead, vocabulary)
        sampling = SamplingTensors.from_params([f], vocabulary)
        drafted = torch.stack(
            [
                sample_tokens(logits[:, at], sampling, keys, positions + at, Purpose.DRAFT, probs=draft_probs[:, at])
                for at in range(lookahead)
            ],
            1,
        )

        def ours(drafted=drafted, draft_probs=draft_probs, sampling=sampling, backend: str = "auto"):
            return speculative_accept(logits, drafted, draft_probs, sampling, keys, positions, backend=backend)

        def theirs(f: SamplingParams = f, drafted: torch.Tensor = drafted, draft_probs: torch.Tensor = draft_probs):
            if f.greedy:
                choices = logits.argmax(-1)
                accepted = (choices[:, :-1] == drafted).int().cumprod(1).sum(1)
                return accepted, choices.gather(1, accepted[:, None])
            return torch_accept(logits, drafted, draft_probs, f)

        if [t.tolist() for t in ours()] != [t.tolist() for t in ours(backend="reference")]:
            raise SystemExit(f"speculative_accept, {name}: differs from the reference; not timed")
        progress(f"timing speculative_accept, {name}, which is right")
        times = in_turns({"ours": ours, "torch": theirs})
        _add(report, "speculative_accept", name, times, logits.nbytes, "torch", "float32", tokens=lookahead + 1)


def _add(
    report: Report,
    op: str,
    shape: str,
    times: dict[str, float],
    moved: int,
    baseline: str,
    dtype: str = "bfloat16",
    **size: int,
) -> None:
    speed = moved / times["ours"] / 1e9
    report.add(
        op=op, backend="cpu", shape=shape, dtype=dtype, batch=1, median_s=times["ours"], gb_per_s=speed,
        share_of_bandwidth=speed / memory_reader().gb_per_s(times["memory"]), baseline=baseline,
        ratio=times[baseline] / times["ours"], **size,
    )  # fmt: skip


def tasks(models: list[str]) -> Iterator[tuple[str, Callable[[Report], None]]]:
    """What can be timed, with the name of its op: shapes that say most first, then those of the models named."""
    rows = (1, 2, 3, 4, 5, 6, 8, 16)
    yield "skinny_linear", partial(bench_linear, in_features=2560, out_features=5120, rows_list=rows)
    yield "skinny_linear", partial(bench_blocks, in_features=2560, out_features=5120, rows_list=rows)
    tiny = published_config("granite-4.0-h-tiny")
    experts = next(c for c in tiny.mixers[1] if isinstance(c, ExpertsConfig))
    yield "expert_linear", partial(bench_experts, config=experts, d_model=tiny.d_model)
    yield "expert_linear", partial(bench_expert_blocks, config=experts, d_model=tiny.d_model)
    yield "speculative_accept", bench_accept
    for name in ("mamba2-130m", "mamba2-2.7b"):
        yield "ssd_verify", partial(bench_ssd, config=published_config(name))
    yield "attention_verify", partial(bench_attention, heads=32, kv_heads=8, dims=128)
    for name in models:
        c = published_config(name)
        mixer = c.blocks[0]
        inner, outer = (c.d_model, 2 * mixer.d_inner), (mixer.d_inner, c.d_model)
        small = (mixer.d_inner, mixer.dt_rank + 2 * mixer.d_state), (mixer.dt_rank, mixer.d_inner)
        for in_features, out_features in (inner, *small, outer):
            yield "skinny_linear", partial(bench_linear, in_features=in_features, out_features=out_features)
        for in_features, out_features in (inner, outer):
            yield "skinny_linear", partial(bench_blocks, in_features=in_features, out_features=out_features)
        yield "rms_norm", partial(bench_norm, config=c)
        yield "causal_conv1d_verify", partial(bench_conv, config=c)
        yield "selective_scan_verify", partial(bench_scan, config=c)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="*", default=list(SHAPES), choices=SHAPES, help="whose shapes to run")
    arguments.add_argument("--ops", nargs="*", choices=OPS, help="which ops; all of them by default")
    options = arguments.parse_args()
    text: Callable[[object], str] = str
    report = Report(
        {
            "op": text, "dtype": text, "shape": text, "rows": text, "tokens": text, "median_s": seconds,
            "gb_per_s": number, "share_of_bandwidth": share, "baseline": text, "ratio": number,
        }
    )  # fmt: skip
    wanted = [task for name, task in tasks(options.models) if not options.ops or name in options.ops]
    for task in wanted:
        task(report)
    report.write(options.json)


if __name__ == "__main__":
    main()
