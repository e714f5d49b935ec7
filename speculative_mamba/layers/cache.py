"""Per-position checkpoints of one layer's state, and the arguments that all layers of one call share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops.replay import ReplayBuffer

CAPACITY_STEP = 64  # entries by which an attention cache grows at least


@dataclass
class Window:
    """Where a call starts and what it writes.

    start_slot (B) int32, write_slot, left_padding (B) int32 or None, final_state_only: see ``selective_scan_verify``.
    fused: whether layers call the ops that do what several do, with the same bits in fewer launches.
    """

    start_slot: torch.Tensor
    write_slot: int = 0
    left_padding: torch.Tensor | None = None
    final_state_only: bool = False
    fused: bool = False


@dataclass
class CacheSizes:
    """Rows and slots; the dtype of what is carried from token to token; how a Mamba layer goes back: "snapshots",
    "replay" or "auto"."""

    batch: int
    slots: int
    dtype: torch.dtype = torch.float32
    rollback: str = "auto"

    def replay(self, faster: bool) -> bool:
        """Whether to keep inputs; with "auto" where that is measured to be faster and there is a slot to go back to."""
        return self.rollback == "replay" or (self.rollback == "auto" and faster and self.slots > 1)


@dataclass
class ConvCache:
    """What a convolution without a scan remembers, in slots as of ``MambaCache``: the inputs before the next token.

    window: (B, W-1+S, D) float32 (see ``causal_conv1d_verify``); slots: S.
    """

    window: torch.Tensor
    slots: int

    def tensors(self) -> list[torch.Tensor]:
        return [self.window]

    def initial(self) -> list[torch.Tensor]:
        """Views (B, …) of what is zero where a row's slot 0 is that of an empty text."""
        return [self.window[:, : self.window.shape[1] - self.slots + 1]]

    def reset(self) -> None:
        """Makes slot 0 of every row that of an empty text."""
        for view in self.initial():
            view.zero_()

    def row(self, index: int) -> "ConvCache":
        """A view of one row."""
        return ConvCache(self.window[index : index + 1], self.slots)

    def snapshot(self, row: int, slot: int) -> tuple[torch.Tensor]:
        """A copy of the W-1 inputs before the token that follows a row's slot."""
        history = self.window.shape[1] - self.slots
        return (self.window[row, slot + 1 : slot + 1 + history].clone(),)

    def restore(self, row: int, saved: tuple[torch.Tensor]) -> None:
        """Puts a checkpoint into a row's slot 0."""
        [history] = saved
        self.window[row, 1 : 1 + len(history)] = history


def new_conv_cache(sizes: CacheSizes, channels: int, width: int, device: torch.device) -> ConvCache:
    """An empty cache."""
    shape = (sizes.batch, width - 1 + sizes.slots, channels)
    cache = ConvCache(torch.empty(shape, dtype=torch.float32, device=device), sizes.slots)
    cache.reset()
    return cache


@dataclass
class MambaCache:
    """What a Mamba layer remembers, in slots: slot j holds the state after token j of the last window.

    states: (B, S, …) float32, bfloat16 or float16, one per slot; or with ``inputs`` (B, 1, …), and the inputs that lead
    from there to each slot (see ``ReplayBuffer``). window: (B, W-1+S, D) float32, the convolution's inputs (see
    ``causal_conv1d_verify``). Slot 0 starts as the zero state; the others are not read before they are written.

    materialize_state: called as ``materialize_state(cache, slot)`` on a copy of one row with ``inputs``; makes slot 0
    the state of that slot.
    """

    states: torch.Tensor
    window: torch.Tensor
    inputs: ReplayBuffer | None = None
    materialize_state: "Callable[[MambaCache, int], None] | None" = None

    @property
    def slots(self) -> int:
        return self.states.shape[1] if self.inputs is None else self.inputs.dt.shape[1]

    @property
    def conv(self) -> ConvCache:
        """A view of the window alone."""
        return ConvCache(self.window, self.slots)

    def tensors(self) -> list[torch.Tensor]:
        return [self.states, self.window, *([] if self.inputs is None else vars(self.inputs).values())]

    def initial(self) -> list[torch.Tensor]:
        """Views (B, …) of what is zero where a row's slot 0 is the zero state."""
        replayed = [] if self.inputs is None else [self.inputs.dt[:, 0]]
        return [self.states[:, 0], *self.conv.initial(), *replayed]

    def reset(self) -> None:
        """Makes slot 0 of every row the zero state."""
        for view in self.initial():
            view.zero_()

    def row(self, index: int) -> "MambaCache":
        """A view of one row."""
        return self._of_row(lambda tensor: tensor[index : index + 1])

    def snapshot(self, row: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the state in a row's slot and of the W-1 conv inputs before the token that follows it."""
        if self.inputs is None:
            return self.states[row, slot].clone(), *self.conv.snapshot(row, slot)
        copy = self._of_row(lambda tensor: tensor[row : row + 1].clone())
        self.materialize_state(copy, slot)
        return copy.states[0, 0], *self.conv.snapshot(row, slot)

    def restore(self, row: int, saved: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Puts a checkpoint into a row's slot 0."""
        state, *history = saved
        self.states[row, 0] = state
        self.conv.restore(row, history)
        if self.inputs is not None:
            self.inputs.dt[row, 0] = 0

    def _of_row(self, part: Callable[[torch.Tensor], torch.Tensor]) -> "MambaCache":
        inputs = None if self.inputs is None else ReplayBuffer(*map(part, vars(self.inputs).values()))
        return MambaCache(part(self.states), part(self.window), inputs, self.materialize_state)


def new_mamba_cache(
    sizes: CacheSizes,
    replay: bool,
    state: tuple[int, ...],
    conv: tuple[int, int],
    inputs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    device: torch.device,
    materialize_state: Callable[[MambaCache, int], None],
) -> MambaCache:
    """An empty cache. state: its shape; conv: (channels, width); inputs: shapes of x, dt and B of one token."""

    def memory(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    window = new_conv_cache(sizes, *conv, device).window
    states = memory(sizes.batch, 1 if replay else sizes.slots, *state, dtype=sizes.dtype)
    kept = ReplayBuffer(*(memory(sizes.batch, sizes.slots, *shape) for shape in inputs)) if replay else None
    cache = MambaCache(states, window, kept, materialize_state if replay else None)
    cache.reset()
    return cache


@dataclass
class AttentionCache:
    """What an attention layer remembers: slot j's state is the first ``lengths[b, j]`` entries of a row.

    keys, values: (B, G, L, P) float32, bfloat16 or float16, of which entries beyond a length are never read; lengths:
    (B, S) int32. window: (B, W-1+S, D) float32, the inputs of a convolution before the attention, or None.
    at_most: bounds all lengths from above, so that they need not be read.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    window: torch.Tensor | None = None
    at_most: int = 0

    @property
    def slots(self) -> int:
        return self.lengths.shape[1]

    @property
    def conv(self) -> ConvCache | None:
        """A view of the window alone."""
        return None if self.window is None else ConvCache(self.window, self.slots)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values, self.lengths, *([] if self.window is None else [self.window])]

    def initial(self) -> list[torch.Tensor]:
        """Views (B, …) of what is zero where a row's slot 0 is that of an empty text."""
        return [self.lengths, *([] if self.conv is None else self.conv.initial())]

    def reset(self) -> None:
        """Makes slot 0 of every row that of an empty text."""
        for view in self.initial():
            view.zero_()
        self.at_most = 0

    def may_overflow(self, tokens: int) -> bool:
        """Counts so many more tokens; whether ``at_most``, exact then, exceeds the capacity."""
        self.at_most += tokens
        if self.at_most > self.capacity:
            self.at_most = int(self.lengths.max()) + tokens
        return self.at_most > self.capacity

    def row(self, index: int) -> "AttentionCache":
        """A view of one row."""
        return AttentionCache(*(tensor[index : index + 1] for tensor in self.tensors()))

    def grow(self, capacity: int) -> None:
        """Enlarges it to ``capacity`` entries a row; the tensors are then others, or the same if this breaks off."""

        def grown(old: torch.Tensor) -> torch.Tensor:
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            return new

        self.keys, self.values = grown(self.keys), grown(self.values)

    def snapshot(self, row: int, slot: int) -> tuple[torch.Tensor, ...]:
        """Copies of the entries that a row's slot counts, and of its window."""
        length = int(self.lengths[row, slot])
        entries = self.keys[row, :, :length].clone(), self.values[row, :, :length].clone()
        return entries if self.conv is None else (*entries, *self.conv.snapshot(row, slot))

    def restore(self, row: int, saved: tuple[torch.Tensor, ...]) -> None:
        """Puts a checkpoint into a row's slot 0."""
        keys, values, *history = saved
        length = keys.shape[1]
        if length > self.capacity:
            self.grow(grown_capacity(length))
        self.keys[row, :, :length], self.values[row, :, :length] = keys, values
        self.lengths[row, 0] = length
        self.at_most = max(self.at_most, length)
        if self.conv is not None:
            self.conv.restore(row, history)


def grown_capacity(entries: int) -> int:
    """A capacity beyond what is needed, so that a growing text is copied seldom."""
    return -(-max(2 * entries, 1) // CAPACITY_STEP) * CAPACITY_STEP


LayerCache = MambaCache | ConvCache | AttentionCache
