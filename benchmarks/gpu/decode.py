"""Whole runs on a GPU: plain decoding and speculation, kernel by kernel and as one CUDA graph a round.

Weights are random bfloat16 of published shapes, one row, and the draft's tokens are scripted to be right at a stated
rate: a real model of the draft's shape runs for each of them. Texts of all four ways must be equal before a time is
printed. The clock covers decoding after prefill and after graphs were captured. gb_per_s counts the weights that a
round must read, the target's once and the draft's for every drafted token, and share_of_bandwidth compares it with a
copy on the same card. Launches and synchronisations a round are counted by PyTorch's profiler, as the difference
between a longer and a shorter run.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

import speculative_mamba as sm
from speculative_mamba.models.config import AttentionConfig
from speculative_mamba.testing.models import MAMBA2_SHAPES, published_config, random_model
from speculative_mamba.testing.scripted import CapturableScript, agree_at_rate

from ..decode import draft_config
from ..report import Machine, Report, number, seconds, share

MODELS = ("2.8b", "1.4b", "790m", "370m", "130m", "mamba2-2.7b", "hybrid")
LOOKAHEAD, RATE = 4, 0.875  # 3.9 tokens a round
PROMPT_TOKENS, TOKENS, PROFILED = 32, 256, 16
EXECUTORS = ("eager", "graph")
COLUMNS = {
    "case": str, "executor": str, "tokens_per_s": number, "ratio": number, "tokens_per_round": number,
    "median_s": seconds, "gb_per_s": number, "share_of_bandwidth": share, "launches": number,
    "synchronisations": number, "setup_s": seconds,
}  # fmt: skip
# Calls of the CUDA runtime by which the host waits for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def draft_of(target: sm.MambaLM, name: str) -> sm.MambaLM:
    """The 130m shape, or for a hybrid two Llama layers of 1/20 of its bytes."""
    if any(isinstance(block, AttentionConfig) for block in target.config.blocks):
        config = draft_config(target)
    else:
        config = published_config("mamba2-130m" if name in MAMBA2_SHAPES else "130m")
    return random_model(config, dtype=torch.bfloat16, seed=1, device=target.device)


def per_round(run: partial) -> tuple[float, float]:
    """Launches and waits of the host in a round."""
    counted, rounds = [], []
    for tokens in (PROFILED, 2 * PROFILED):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            result = run(max_new_tokens=tokens)
            torch.cuda.synchronize()
        names = Counter(event.name for event in trace.events())
        counted.append([sum(names[name] for name in calls) for calls in (LAUNCHES, WAITS)])
        rounds.append(result.stats.rounds)
    (launches, waits), (more_launches, more_waits) = counted
    return (more_launches - launches) / (rounds[1] - rounds[0]), (more_waits - waits) / (rounds[1] - rounds[0])


def bench_model(report: Report, name: str, device: torch.device, repeats: int = 3) -> None:
    target = random_model(published_config(name), dtype=torch.bfloat16, device=device)
    draft = draft_of(target, name)
    prompt = torch.randint(0, target.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    graphs = sm.GraphExecutor()
    call = partial(sm.generate, target, prompt, lookahead=LOOKAHEAD, stop_token_ids=(), max_new_tokens=TOKENS)
    text = call().sequences[0].tolist()
    scripted = CapturableScript([text], target.vocab_size, agree_at_rate(RATE), device, sm.ModelDrafter(draft))
    ways = {"plain": None} if name == "130m" else {"plain": None, "speculative": scripted}
    runs = {
        (way, executor): partial(call, draft=drafter, executor=graphs if executor == "graph" else executor)
        for way, drafter in ways.items()
        for executor in EXECUTORS
    }
    first = {case: run() for case, run in runs.items()}
    for case, result in first.items():
        if result.sequences[0].tolist() != text:
            raise AssertionError(f"{name}: the text of {' '.join(case)} differs from plain decoding; not timed")
    speeds: dict[tuple, list[float]] = {case: [] for case in runs}
    for _ in range(repeats):
        for case, run in runs.items():
            speeds[case].append(run().stats.tokens_per_s)
    plain = statistics.median(speeds["plain", "graph"])
    for (way, executor), run in runs.items():
        stats, speed = first[way, executor].stats, statistics.median(speeds[way, executor])
        launches, waits = per_round(run)
        moved = target.weight_bytes + (LOOKAHEAD * draft.weight_bytes if way == "speculative" else 0)
        gb_per_s = moved * speed / stats.tokens_per_round / 1e9
        report.add(
            op="generate", case=f"{name} {way}", executor=executor, backend=target.backend,
            shape=f"{target.config.d_model}x{len(target.blocks)}", dtype="bfloat16", batch=1,
            tokens=LOOKAHEAD + 1 if way == "speculative" else 1, tokens_per_s=speed,
            tokens_per_round=stats.tokens_per_round, median_s=stats.tokens_per_round / speed, gb_per_s=gb_per_s,
            share_of_bandwidth=gb_per_s / report.bandwidth, launches=launches, synchronisations=waits,
            setup_s=stats.setup_s, baseline="plain decoding in a CUDA graph", ratio=speed / plain,
        )  # fmt: skip


def time_models(names: Sequence[str], device: torch.device, card: str, bandwidth: float) -> tuple[Report, list[str]]:
    """Rows, and what was not timed and why."""
    report, failures = Report(COLUMNS, Machine(f"{card}; copies {bandwidth:.0f} GB/s", "bfloat16", bandwidth)), []
    for name in names:
        try:
            bench_model(report, name, device)
        except Exception as error:
            failures.append(f"{name}: not timed: {' '.join(str(error).split()) or type(error).__name__}")
        torch.cuda.empty_cache()
    return report, failures
