"""A small call of every op on activations, by name."""

import torch

from speculative_mamba import ops

B, T, D, N = 2, 5, 40, 16


class Random:
    """Tensors that are the same for every call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def activations(self, *shape: int) -> torch.Tensor:
        return self(*shape).to(self.dtype)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def slots(self, *shape: int) -> torch.Tensor:
        """(B, T, …), of which slot 0 is a start state and the rest unread."""
        slots = torch.full((B, T, *shape), torch.nan)
        slots[:, 0] = self(B, *shape)
        return slots


def conv(r: Random) -> tuple[dict, dict, dict]:
    window = torch.cat([r(B, 4, D), torch.full((B, T - 1, D), torch.nan)], 1)
    return {"x": r.activations(B, T, D)}, {"window": window}, {"weight": r(D, 4), "bias": r(D)}


def scan(r: Random) -> tuple[dict, dict, dict]:
    window = {name: r.activations(B, T, D) for name in ("x", "dt", "z")}
    window |= {name: r.activations(B, T, N) for name in ("B", "C")}
    return window, {"states": r.slots(D, N)}, {"A": -r(D, N).exp(), "D": r(D), "dt_bias": r(D)}


def ssd(r: Random) -> tuple[dict, dict, dict]:
    heads, size = 4, 10
    window = {"x": r.activations(B, T, heads, size), "dt": r.activations(B, T, heads)}
    window |= {"z": r.activations(B, T, heads, size)}
    window |= {name: r.activations(B, T, 2, N) for name in ("B", "C")}
    return window, {"states": r.slots(heads, size, N)}, {"A": -r(heads).exp(), "D": r(heads), "dt_bias": r(heads)}


def attention(r: Random) -> tuple[dict, dict, dict]:
    window = {"q": r.activations(B, T, 4, 16), "k": r.activations(B, T, 2, 16), "v": r.activations(B, T, 2, 16)}
    lengths = torch.full((B, T), -1, dtype=torch.int32)
    lengths[:, 0] = torch.tensor([3, 37])
    cache = {"keys": r(B, 2, 64, 16), "values": r(B, 2, 64, 16), "lengths": lengths}
    return window, cache, {"inv_freq": torch.tensor([1.0, 0.1, 0.01])}


def linear(r: Random) -> tuple[dict, dict, dict]:
    return {"x": r.activations(B * T, 200)}, {}, {"weight": r.activations(33, 200), "bias": r(33)}


def norm(r: Random) -> tuple[dict, dict, dict]:
    return {"x": r.activations(B * T, D), "residual": r(B * T, D)}, {}, {"weight": r.activations(D)}


def silu(r: Random) -> tuple[dict, dict, dict]:
    return {"gate": r.activations(B * T, D), "up": r.activations(B * T, D)}, {}, {}


# op -> what depends on the token, what is written, the rest
CASES = {
    "causal_conv1d_verify": conv, "selective_scan_verify": scan, "ssd_verify": ssd, "attention_verify": attention,
    "skinny_linear": linear, "rms_norm": norm, "mlp_activation": silu,
}  # fmt: skip


def call(op: str, window: dict, cache: dict, rest: dict, backend: str, start: int = 0, first: int = 0) -> torch.Tensor:
    if cache:
        rest = rest | {"start_slot": torch.full((B,), start, dtype=torch.int32), "write_slot": first}
    y = getattr(ops, op)(**window, **cache, **rest, backend=backend)
    return y[0] if isinstance(y, tuple) else y
