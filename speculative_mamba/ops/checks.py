"""Checks of op arguments; each failure is one line that names the argument."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .backend import resolve
from .block_formats import GROUP
from .block_weight import BlockWeight, find_format
from .replay import ReplayBuffer
from .sampling_tensors import SamplingTensors

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CONV_WIDTH = 8
ON_GPU = ("q8_0", "q4_0")  # formats of blocks


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor, dtype=torch.float32) -> None:
    """Shape, dtype, device of an argument; the last dimension must be contiguous.

    ``dtype`` is one dtype or a tuple of allowed ones; ``like`` is a tensor on the device that is expected.

    Raises:
        ValueError: something does not fit.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype and (not isinstance(dtype, tuple) or tensor.dtype not in dtype):
        allowed = " or ".join(str(d) for d in dtype) if isinstance(dtype, tuple) else dtype
        raise ValueError(f"{name} must be {allowed}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    if not tensor.is_contiguous() and tensor.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    if tensor.data_ptr() % tensor.element_size():
        raise ValueError(f"{name} must lie at a multiple of its {tensor.element_size()} bytes per element; copy it")


def check_written(written: dict[str, torch.Tensor | None], read: dict[str, torch.Tensor | None]) -> None:
    """Elements that a call writes lie where no other element lies that it writes or reads. By name, None for nothing.

    Tensors may lie in gaps of one another if their rows are equally far apart, as keys and values of one buffer do.

    Raises:
        ValueError: some may lie at one place.
    """
    if _lie_apart(written.values(), read.values()):
        return
    known = {name: _extent(tensor) for name, tensor in (written | read).items() if tensor is not None}
    names = list(known)
    for number, name in enumerate(names):
        if name not in written:
            break
        if known[name].overlaps_itself:
            strides = written[name].stride()
            raise ValueError(
                f"{name} is written, so its elements must not share memory, got strides {strides}; copy it"
            )
        for other in names[number + 1 :]:
            if known[name].meets(known[other]):
                raise ValueError(f"{name} is written, so it must not share memory with {other}; copy one of them")


def _lie_apart(written: Iterable[torch.Tensor | None], read: Iterable[torch.Tensor | None]) -> bool:
    """Whether what is written is contiguous, and its storages share no byte with others: the usual case, seen in a
    fifth of the time."""
    spans = []
    for tensor in written:
        if tensor is not None:
            if not tensor.is_contiguous():
                return False
            spans.append(_span(tensor))
    spans += {_span(tensor) for tensor in read if tensor is not None}
    spans.sort()
    end = 0
    for first, size in spans:
        if first < end:
            return False
        end = first + size
    return True


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and number of bytes of a tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@dataclass(slots=True)
class _Extent:
    """Bytes of a tensor: the first, how many from there on, and without its outermost dimension, whose stride it is."""

    first: int
    length: int
    row: int
    stride: int
    overlaps_itself: bool

    def meets(self, other: "_Extent") -> bool:
        if self.first >= other.first + other.length or other.first >= self.first + self.length:
            return False
        gap = (other.first - self.first) % self.stride if self.stride and self.stride == other.stride else 0
        return not (self.row <= gap and gap + other.row <= self.stride)


def _extent(tensor: torch.Tensor) -> _Extent:
    size = tensor.element_size()
    if not tensor.numel() or tensor.is_meta:  # a meta tensor has no memory
        return _Extent(0, 0, 0, 0, False)
    reach, row, outer, overlaps = 1, 1, 0, False
    for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count > 1:
            overlaps = overlaps or stride < reach
            row, outer = reach, stride
            reach += stride * (count - 1)
    return _Extent(tensor.data_ptr(), reach * size, row * size, outer * size, overlaps)


def check_activations(name: str, x: torch.Tensor, backend: str) -> None:
    """What flows between layers: float32, bfloat16 or float16; on backend ``cpu`` float32."""
    only_float32 = x.dtype is torch.float32 or resolve(backend, x.device.type) == "cpu"
    check(name, x, x.shape, x, torch.float32 if only_float32 else WEIGHT_DTYPES)


def check_blocks(weight: BlockWeight, shape: tuple[int, int], like: torch.Tensor, backend: str) -> None:
    """A weight in blocks, and whether the backend has kernels for its format."""
    if tuple(weight.shape) != shape:
        raise ValueError(f"weight must have shape {shape}, got {tuple(weight.shape)}")
    kind = find_format(weight.format, shape[1])
    groups = -(-shape[0] // GROUP), kind.group_bytes(shape[1])
    check("weight.data", weight.data, groups, like, torch.uint8)
    check_contiguous("weight.data", weight.data)
    name = resolve(backend, like.device.type)
    if name in ("cuda", "triton") and weight.format not in ON_GPU:
        raise ValueError(f"backend '{name}' has kernels for {' and '.join(ON_GPU)}, not for {weight.format}; use cpu")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_slots(x: torch.Tensor, slots: int, start_slot: torch.Tensor, write_slot: int, final_state_only: bool) -> None:
    """The window x (B, T, D) must fit into slots write_slot … write_slot+T-1 of S; with final_state_only it goes to 0.

    The values in ``start_slot`` are data and stay on the device; on the CPU they are cheap to check, so they are.
    """
    batch, tokens, _ = x.shape
    if tokens < 1:
        raise ValueError("x must hold at least one token per row")
    if final_state_only and write_slot != 0:
        raise ValueError(f"with final_state_only the state goes to slot 0, so write_slot must be 0, got {write_slot}")
    tokens = 1 if final_state_only else tokens
    if not 0 <= write_slot <= slots - tokens:
        raise ValueError(f"{tokens} tokens from slot {write_slot} on do not fit into {slots} slots")
    check_start_slot(start_slot, slots, batch, x)


def check_start_slot(start_slot: torch.Tensor, slots: int, batch: int, like: torch.Tensor) -> None:
    """A slot of S, or -1 for a row that is left out."""
    check("start_slot", start_slot, (batch,), like, torch.int32)
    if start_slot.is_cpu and batch:
        values = start_slot.tolist()
        if min(values) < -1 or max(values) >= slots:
            raise ValueError(f"start_slot must be in [0, {slots}), or -1 to leave a row out, got {values}")


def check_inputs(inputs: ReplayBuffer, shapes: dict[str, tuple[int, ...]], like: torch.Tensor) -> int:
    """Inputs to be replayed; ``shapes`` are those of one token. How many slots there are."""
    if inputs.dt.ndim != 2 + len(shapes["dt"]):
        raise ValueError(f"inputs.dt must have {2 + len(shapes['dt'])} dimensions, got {tuple(inputs.dt.shape)}")
    rows_and_slots = len(like), inputs.dt.shape[1]
    for name, shape in shapes.items():
        check(f"inputs.{name}", getattr(inputs, name), rows_and_slots + shape, like)
        check_contiguous(f"inputs.{name}", getattr(inputs, name))
    return rows_and_slots[1]


def check_follows(start_slot: torch.Tensor, write_slot: int) -> None:
    """Inputs are replayed in order, so new ones must follow the last. On the CPU that is cheap to check."""
    expected = write_slot - 1
    if write_slot and start_slot.is_cpu and set(start_slot.tolist()) - {expected, -1}:
        raise ValueError(
            f"with inputs, write_slot {write_slot} continues from slot {expected} in every row, "
            f"got start_slot {start_slot.tolist()}"
        )


def check_left_padding(left_padding: torch.Tensor | None, batch: int, x: torch.Tensor) -> None:
    if left_padding is not None:
        check("left_padding", left_padding, (batch,), x, torch.int32)


def check_row_status(row_status: torch.Tensor | None, batch: int, like: torch.Tensor) -> None:
    if row_status is not None:
        check("row_status", row_status, (batch,), like, torch.int32)


def check_rng_keys(rng_keys: torch.Tensor, positions: torch.Tensor, batch: int, like: torch.Tensor) -> None:
    check("rng_keys", rng_keys, (batch, 2), like, torch.int64)
    check("positions", positions, (batch,), like, torch.int64)
    check_contiguous("rng_keys", rng_keys)
    check_contiguous("positions", positions)


def check_active(active: torch.Tensor | None, batch: int, like: torch.Tensor) -> None:
    if active is not None:
        check("active", active, (batch,), like, torch.bool)
        check_contiguous("active", active)


def check_num_draft_tokens(
    num_draft_tokens: torch.Tensor | None, active: torch.Tensor | None, batch: int, like: torch.Tensor
) -> None:
    """Whole numbers from 0 up in active rows; their values are cheap to check on the CPU, so they are."""
    if num_draft_tokens is None:
        return
    check("num_draft_tokens", num_draft_tokens, (batch,), like, torch.int32)
    check_contiguous("num_draft_tokens", num_draft_tokens)
    if num_draft_tokens.is_cpu:
        counts = num_draft_tokens.tolist()
        if min(counts, default=0) < 0:
            wanted = [True] * batch if active is None else active.tolist()
            if any(count < 0 and row for count, row in zip(counts, wanted, strict=True)):
                raise ValueError(f"num_draft_tokens must be at least 0, got {counts}")


def token_ids(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Token ids of any integer dtype as int64; their values are cheap to check on the CPU, so they are.

    Raises:
        ValueError: they are no whole numbers, or of no token.
    """
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype is torch.bool:
        raise ValueError(f"tokens must be of an integer dtype, got {tokens.dtype}")
    check_token_ids("tokens", tokens, vocabulary)
    return tokens.long()


def check_tokens(name: str, tokens: torch.Tensor, shape: tuple[int, ...], vocabulary: int, like: torch.Tensor) -> None:
    """Token ids of the vocabulary; their values are cheap to check on the CPU, so they are."""
    check(name, tokens, shape, like, torch.int64)
    check_contiguous(name, tokens)
    check_token_ids(name, tokens, vocabulary)


def check_token_ids(name: str, tokens: torch.Tensor, vocabulary: int) -> None:
    """Their values are cheap to check on the CPU, so they are."""
    if tokens.is_cpu and tokens.numel():
        ids = tokens.tolist() if tokens.ndim < 2 else [id for row in tokens.tolist() for id in row]
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"{name} must hold token ids from 0 to {vocabulary - 1}, got {tokens.tolist()}")


def check_sampling(
    sampling: SamplingTensors,
    prompt_mask: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    batch: int,
    vocabulary: int,
    like: torch.Tensor,
) -> None:
    """Parameters of every row, and the text that penalties need; ``SamplingTensors`` has checked itself."""
    if not isinstance(sampling, SamplingTensors):
        raise ValueError(f"sampling must be SamplingTensors, got {type(sampling).__name__}")
    if sampling.rows != batch or sampling.temperature.device != like.device:
        check("sampling.temperature", sampling.temperature, (batch,), like)
    for name, tensor, dtype in (
        ("prompt_mask", prompt_mask, torch.bool),
        ("output_counts", output_counts, torch.int32),
    ):
        if tensor is not None:
            check(name, tensor, (batch, vocabulary), like, dtype)
            check_contiguous(name, tensor)
        elif sampling.has_penalties:
            raise ValueError(f"penalties need {name}, which counts the tokens of each text")
    if sampling.bias_capacity and like.is_cpu and sampling.bias_ids.numpy().max(initial=-1) >= vocabulary:
        raise ValueError(f"sampling.bias_ids must be below {vocabulary}, the size of the vocabulary")
