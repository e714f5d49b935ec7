"""Times the two ways to be able to go back, a state for every token or one state and the inputs since, against batch.

python -m benchmarks.rollback [--shapes 130m mamba2-2.7b] [--batches 1 4 16 64] [--lookahead 4] [--json FILE]

One layer's scan of K+1 tokens a row, each row starting from a slot drawn at random, as after acceptance; states lie in
memory that no cache holds. bytes_per_row is what a row's checkpoints take in all layers; moved counts the bytes of
states and inputs that a call reads and writes once. Both modes must give the same bits before they are timed.
"""

import math

import torch

from speculative_mamba.layers.cache import CacheSizes, MambaCache
from speculative_mamba.layers.mamba1 import Mamba1Mixer
from speculative_mamba.layers.mamba2 import Mamba2Mixer
from speculative_mamba.models.config import ModelConfig
from speculative_mamba.ops import selective_scan_verify, ssd_verify
from speculative_mamba.testing.models import published_config, random_model
from speculative_mamba.testing.timing import interleaved_medians, rotate

from .report import Report, number, parser, progress, seconds, share

SHAPES = ("130m", "2.8b", "mamba2-130m", "mamba2-2.7b")
BATCHES = (1, 4, 16, 64)
MODES = ("snapshots", "replay")
MOST_BYTES = 3 * 2**30
BEYOND_CACHES = 2**28


class Layer:
    """One layer of a model's shape, its inputs for one window, and its checkpoints in one mode after the other."""

    def __init__(self, config: ModelConfig, batch: int, tokens: int) -> None:
        small = ModelConfig(16, 8, config.blocks[:1])  # the width of the model does not matter to the scan
        self.mixer = random_model(small).blocks[0].mixers[0]
        self.batch, self.tokens = batch, tokens
        cache = self.cache("replay")
        *_, B = vars(cache.inputs).values()
        self.x, self.dt, self.B = (torch.randn(batch, tokens, *kept.shape[2:]) for kept in vars(cache.inputs).values())
        groups = self.mixer.heads[2] if isinstance(self.mixer, Mamba2Mixer) else 1
        self.C = torch.randn(batch, tokens, groups, B.shape[-1])

    def cache(self, mode: str) -> MambaCache:
        """After one window, with random states and inputs."""
        cache = self.mixer.new_cache(CacheSizes(self.batch, self.tokens, rollback=mode))
        cache.states.normal_()
        if cache.inputs is not None:
            for kept in vars(cache.inputs).values():
                kept.uniform_(0, 0.1)
        return cache

    def scan(self, cache: MambaCache, start: torch.Tensor) -> torch.Tensor:
        m = self.mixer
        if isinstance(m, Mamba1Mixer):
            return selective_scan_verify(
                self.x, self.dt, m.A, self.B, self.C, m.D, None, m.dt_bias, cache.states, start, inputs=cache.inputs
            )
        return ssd_verify(
            self.x, self.dt, m.A, self.B, self.C, m.D, m.dt_bias, cache.states, start, inputs=cache.inputs
        )


def bytes_of(cache: MambaCache) -> int:
    return cache.states.nbytes + (
        0 if cache.inputs is None else sum(kept.nbytes for kept in vars(cache.inputs).values())
    )


def check(layer: Layer) -> None:
    """From the same state, three windows in a row give the same bits in both modes."""
    caches = {mode: layer.cache(mode) for mode in MODES}
    caches["snapshots"].states[:, :1] = caches["replay"].states
    caches["replay"].inputs.dt[:, 0] = 0
    for slot in (0, layer.tokens - 1, layer.tokens // 2):
        start = torch.full((layer.batch,), slot, dtype=torch.int32)
        one, other = (layer.scan(cache, start) for cache in caches.values())
        if not torch.equal(one, other):
            raise SystemExit("the two modes differ; not timed")


def bench(report: Report, shape: str, batch: int, tokens: int) -> None:
    progress(f"{shape}, {batch} rows")
    config = published_config(shape)
    layer = Layer(config, batch, tokens)
    check(layer)
    start = torch.randint(0, tokens, (batch,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    sizes = {mode: bytes_of(layer.cache(mode)) for mode in MODES}
    one_state = layer.cache("replay").states.nbytes
    moved = {"snapshots": (tokens + 1) * one_state, "replay": 2 * one_state + 2 * (sizes["replay"] - one_state)}
    functions = {}
    for mode in MODES:
        copies = math.ceil(min(BEYOND_CACHES, MOST_BYTES / 2) / sizes[mode])
        next_cache = rotate([layer.cache(mode) for _ in range(min(copies, 32))])
        functions[mode] = lambda next_cache=next_cache: layer.scan(next_cache(), start)
    times = interleaved_medians(functions, rounds=9)
    for mode in MODES:
        rate = moved[mode] / times[mode] / 1e9
        report.add(
            op="scan", backend="cpu", case=f"{shape} {mode}", shape=shape, mode=mode, dtype="float32", batch=batch,
            tokens=tokens, median_s=times[mode], bytes_per_row=len(config.blocks) * sizes[mode] // batch,
            megabytes_per_row=len(config.blocks) * sizes[mode] / batch / 1e6, gb_per_s=rate,
            share_of_bandwidth=rate / report.bandwidth, baseline="snapshots", ratio=times["snapshots"] / times[mode],
        )  # fmt: skip


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="*", default=SHAPES, metavar="SHAPE", help="published shapes")
    arguments.add_argument("--batches", nargs="*", type=int, default=BATCHES, metavar="ROWS")
    arguments.add_argument("--lookahead", type=int, default=4, metavar="K", help="tokens drafted a round")
    options = arguments.parse_args()
    report = Report(
        {
            "case": str, "batch": str, "tokens": str, "megabytes_per_row": number, "median_s": seconds,
            "gb_per_s": number, "share_of_bandwidth": share, "ratio": number,
        }
    )  # fmt: skip
    for shape in options.shapes:
        for batch in options.batches:
            bench(report, shape, batch, options.lookahead + 1)
    report.write(options.json)


if __name__ == "__main__":
    main()
