"""Arguments of ``selective_scan_verify`` with odd sizes, unlucky strides and NaN in memory that must not be read."""

import torch

PER_TOKEN = ("x", "dt", "B", "C", "z")
BASE = {
    "batch": 3, "tokens": 5, "channels": 33, "state_size": 16, "b_groups": None, "c_groups": None, "slots": 8,
    "gate": True, "contiguous": False, "dtype": torch.float32,
}  # fmt: skip


def make(change: dict | None = None, seed: int = 0, start: int = 0) -> dict:
    """Arguments of the op, ``dtype`` that of the states; without groups B and C are (B, T, N).

    Inputs lie in wider tensors full of NaN; of the states only slot ``start`` is a number.
    """
    c = {**BASE, **(change or {})}
    batch, tokens, channels, state_size = c["batch"], c["tokens"], c["channels"], c["state_size"]
    g = torch.Generator().manual_seed(seed)

    def window(size: int) -> torch.Tensor:
        if c["contiguous"]:
            return torch.randn(batch, tokens, size, generator=g)
        wide = torch.full((batch, tokens, size + 7), torch.nan)
        wide[..., 3 : 3 + size] = torch.randn(batch, tokens, size, generator=g)
        return wide[..., 3 : 3 + size]

    def grouped(groups: int | None) -> torch.Tensor:
        return window(state_size) if groups is None else window(groups * state_size).unflatten(2, (groups, state_size))

    shape = (batch, c["slots"], 1 if c["contiguous"] else 2, channels, state_size)
    states = torch.full(shape, torch.nan, dtype=c["dtype"])[:, :, 0]
    states[:, start] = torch.randn(batch, channels, state_size, generator=g)
    return {
        "x": window(channels),
        "dt": window(channels),
        "A": -torch.rand(channels, state_size, generator=g) * state_size,
        "B": grouped(c["b_groups"]),
        "C": grouped(c["c_groups"]),
        "D": torch.randn(channels, generator=g),
        "z": window(channels) if c["gate"] else None,
        "dt_bias": torch.rand(channels, generator=g) * 3 - 4,
        "states": states,
        "start_slot": torch.full((batch,), start, dtype=torch.int32),
    }


def cut(inputs: dict, tokens: slice = slice(None), batch: slice = slice(None), **other: object) -> dict:
    """Views of some tokens and rows."""
    part = {k: v[batch, tokens] if k in PER_TOKEN and v is not None else v for k, v in inputs.items()}
    return {**part, "states": inputs["states"][batch], "start_slot": inputs["start_slot"][batch], **other}


def copy(inputs: dict, **other: object) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} | other


def split(inputs: dict, pieces: list[int]) -> list[dict]:
    """The window in pieces of that many tokens."""
    ends = torch.tensor(pieces).cumsum(0).tolist()
    return [cut(inputs, slice(end - length, end)) for end, length in zip(ends, pieces, strict=True)]
