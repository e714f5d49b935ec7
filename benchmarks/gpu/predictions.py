"""What an H100 should need, from the bytes that each op must move and the kernels that it starts."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from speculative_mamba.models.config import ModelConfig
from speculative_mamba.models.sources import QUANTIZED
from speculative_mamba.testing.models import published_config

from .cases import MLP, OPS, VOCABULARY, Case, cases, matrices
from .recurrences import MODES

BANDWIDTH = 3.0e12  # bytes per second, of a copy on the card
PER_LAUNCH = (2.5e-6, 1.25e-6)  # seconds: a kernel after another in a graph, without and with programmatic launch
MODEL, DRAFT, TOKENS, FILTERED = "2.8b", "130m", 5, "top-k+top-p"
WINDOWS = ("causal_conv1d_verify", "selective_scan_verify", "ssd_verify", "attention_verify")

_LETTERS = {"rows": "M", "tokens": "T", "batch": "B"}
_WIDTHS = (21, 15, 8, 11, 8, 7, 8, 8, 7, 7, 4, 5)
_HEADER = ("op", "shape", "dtype", "mode", "size", "MB", "launches", "bytes us", "us", "us PDL", "x", "x PDL")
_EXPLANATION = """\
Predictions for an H100, none of them measured. bytes us: bytes moved once at {bandwidth} TB/s. us: that and {plain} us
a launch; us PDL: that and {programmatic} us a launch, where programmatic dependent launch hides the rest. x: calls of
one token after another, each of which reads and writes a state, over the one call. All bytes come from memory, none
from L2. Left out, and therefore expected on top: the scans' arithmetic, which sets the time of 64 rows with states in
16 bits or with inputs fed again; the waits of matrices with one or two rows for each multiprocessor; and the dozen
barriers of the block that ranks a row's likeliest tokens."""


@dataclass(frozen=True)
class Cost:
    moved: int = 0
    launches: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.moved + other.moved, self.launches + other.launches)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.moved * times, self.launches * times)

    def seconds(self, per_launch: float) -> float:
        return self.moved / BANDWIDTH + self.launches * per_launch


class Costs:
    """Of every case, by what tells cases apart."""

    def __init__(self) -> None:
        self._cases = {self._key(c.op, c.shape, c.dtype, c.mode, **c.sizes): c for c in cases()}

    @staticmethod
    def _key(op: str, shape: str, dtype: torch.dtype, mode: str | None = None, **sizes: int) -> tuple:
        return op, shape, dtype, mode, *sorted(sizes.items())

    def of(self, *key: object, **sizes: int) -> Cost:
        work = self._cases[self._key(*key, **sizes)].work(torch.device("meta"))
        return Cost(work.moved, work.launches)

    def one_by_one(self, case: Case) -> Cost:
        mode = "snapshots" if case.mode else None
        return self.of(case.op, case.shape, case.dtype, mode, **case.sizes | {"tokens": 1}) * case.sizes["tokens"]

    def of_pass(self, config: ModelConfig, tokens: int) -> Cost:
        """A row's tokens through all layers of a Mamba-1 model, and the head."""
        bf16, mixer, rows = torch.bfloat16, config.blocks[0], {"rows": tokens}
        window, D = {"tokens": tokens, "batch": 1}, mixer.d_inner
        linears = {
            name: self.of("skinny_linear", f"{N}x{K}", bf16, **rows) for name, (N, K) in matrices(config).items()
        }
        norm, head = self.of("rms_norm", str(config.d_model), bf16, **rows), linears.pop("head")
        layer = sum(linears.values(), norm)
        layer += self.of("causal_conv1d_verify", f"{D}x{mixer.d_conv}", bf16, **window)
        layer += self.of("selective_scan_verify", f"{D}x{mixer.d_state}", torch.float32, "snapshots", **window)
        return layer * len(config.blocks) + norm + head

    def of_round(self, target: ModelConfig, draft: ModelConfig, lookahead: int) -> Cost:
        """Draft steps, of which the first takes two tokens, the target's pass, and what comes of it."""
        f32, window = torch.float32, {"tokens": lookahead + 1, "batch": 1}
        drafting = self.of_pass(draft, 2) + self.of_pass(draft, 1) * (lookahead - 1)
        drafting += self.of("sample_tokens", str(VOCABULARY), f32, FILTERED, rows=1) * lookahead
        accept = self.of("speculative_accept", str(VOCABULARY), f32, FILTERED, **window)
        commit = self.of("commit_tokens", str(VOCABULARY), torch.int64, **window)
        return drafting + self.of_pass(target, lookahead + 1) + accept + commit


def _shown(every: Iterable[Case], config: ModelConfig) -> list[Case]:
    """The largest shapes at one and five rows, or five tokens of one and 64 rows, op by op."""
    mixer = config.blocks[0]
    shapes = {f"{mixer.d_inner}x{mixer.d_conv}", f"{mixer.d_inner}x{mixer.d_state}", f"{config.d_model}", "80x64x128"}
    shapes |= {f"{N}x{K}" for N, K in matrices(config).values()} | {str(MLP), str(VOCABULARY)}
    sizes = [{"rows": rows} for rows in (1, TOKENS)] + [{"tokens": TOKENS, "batch": batch} for batch in (1, 64)]

    def is_shown(case: Case) -> bool:
        largest = case.shape in shapes or case.op in ("attention_verify", "select_experts", "expert_linear")
        return largest and case.sizes in sizes and case.mode in (None, *MODES, FILTERED) and case.dtype not in QUANTIZED

    return sorted(filter(is_shown, every), key=lambda case: (list(OPS).index(case.op), case.sizes.get("batch", 0)))


def print_predictions() -> None:
    """A line for each of the largest shapes, then the sum for one pass of the 2.8B model."""
    config, costs = published_config(MODEL), Costs()
    plain, programmatic = (f"{seconds * 1e6:g}" for seconds in PER_LAUNCH)
    print(_EXPLANATION.format(bandwidth=BANDWIDTH / 1e12, plain=plain, programmatic=programmatic))
    _print_line(_HEADER)
    for case in _shown(cases(), config):
        cost = costs.of(case.op, case.shape, case.dtype, case.mode, **case.sizes)
        baseline = costs.one_by_one(case) if case.op in WINDOWS else None
        size = " ".join(f"{_LETTERS[name]}={value}" for name, value in case.sizes.items())
        _print_line((case.op, case.shape, case.dtype_name, case.mode or "-", size), cost, baseline)
    for tokens in (TOKENS, 1):
        _print_line(
            (f"one pass of {MODEL}", "all layers", "bfloat16", "snapshots", f"T={tokens} B=1"),
            costs.of_pass(config, tokens),
        )
    _print_line(
        (f"one round of {MODEL}", f"draft {DRAFT}", "bfloat16", "snapshots", f"K={TOKENS - 1} B=1"),
        costs.of_round(config, published_config(DRAFT), TOKENS - 1),
    )


def _print_line(cells: tuple[str, ...], cost: Cost | None = None, baseline: Cost | None = None) -> None:
    if cost is not None:
        microseconds = [cost.seconds(per_launch) * 1e6 for per_launch in (0, *PER_LAUNCH)]
        cells += f"{cost.moved / 1e6:.2f}", str(cost.launches), *(f"{value:.2f}" for value in microseconds)
        if baseline is not None:
            cells += tuple(f"{baseline.seconds(launch) / cost.seconds(launch):.1f}" for launch in PER_LAUNCH)
    print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=False)))
