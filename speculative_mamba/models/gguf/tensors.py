"""The tensors of a GGUF file, where they lie in its mapped memory."""

import torch

from ..files import MappedFile
from ..weights import StoredTensor
from .architectures import EXPERTS, ROPE_FACTORS, Description
from .header import Header, TensorInfo

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_rope_factors(header: Header) -> list[float]:
    """What rotary frequencies are divided by, or nothing."""
    info = header.tensors.get(ROPE_FACTORS)
    if info is None:
        return []
    if info.type != "F32" or len(info.shape) != 1:
        raise ValueError(f"tensor {ROPE_FACTORS} must be F32 in one dimension, not {info.type} {info.shape}")
    with header.path.open("rb") as file:
        file.seek(info.offset)
        return torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.float32).tolist()


def read_gguf_tensors(header: Header, description: Description, file: MappedFile) -> dict[str, StoredTensor]:
    """All tensors by name, except the factors of rotary frequencies; they lie in the mapped file.

    Raises:
        ValueError: the file has been changed since its header was read; or blocks are no matrix.
    """
    data = torch.from_file(str(header.path), shared=False, size=file.size, dtype=torch.uint8)
    file.check(header.path)
    tensors = {}
    for name, info in header.tensors.items():
        if name == ROPE_FACTORS:
            continue
        part, dtype, format = data[info.offset : info.offset + info.nbytes], _DTYPES.get(info.type), None
        if dtype is not None:
            part = part.view(dtype).view(_shape(name, info))
        elif len(info.shape) == (3 if name.endswith(EXPERTS) else 2):
            part, format = part.view(*info.shape[:-1], -1), info.type.lower()
            if format == "q5_0":
                part, format = _q5_0_as_q8_0(part), "q8_0"
        else:
            raise ValueError(f"{header.path}: tensor {name} of shape {info.shape} is {info.type}; only matrices may be")
        heads = description.interleaved.get(name.rpartition(".")[0])
        order = None if heads is None else _halves_of_heads(info.shape[0], heads)
        tensors[name] = StoredTensor(part, file, order, format)
    return tensors


def _shape(name: str, info: TensorInfo) -> tuple[int, ...]:
    """As Hugging Face's checkpoints have it: channels of convolutions are apart, one number per head is a vector."""
    shape = info.shape
    if name.endswith((".ssm_conv1d.weight", ".shortconv.conv.weight")) and len(shape) == 2:
        return shape[0], 1, shape[1]
    if name.endswith(".ssm_norm.weight") or (name.endswith((".ssm_a", ".ssm_d")) and shape[-1] == 1):
        return (-1,)
    return shape


def _q5_0_as_q8_0(part: torch.Tensor) -> torch.Tensor:
    """The same values in blocks of another format: a half as the scale, then a byte for each weight instead of four
    bits, after the fifth ones of all."""
    blocks = part.view(*part.shape[:-1], -1, 22)
    fifth = (blocks[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8)).flatten(-2) & 1
    low = torch.cat([blocks[..., 6:] & 15, blocks[..., 6:] >> 4], -1)
    values = (low | fifth << 4).view(torch.int8) - 16
    return torch.cat([blocks[..., :2], values.view(torch.uint8)], -1).flatten(-2)


def _halves_of_heads(rows: int, heads: int) -> torch.Tensor | None:
    """Rows in the order of Hugging Face's rotary embedding, which turns the first half of a head into the second; the
    file has what belongs together side by side."""
    if rows % (2 * heads):
        return None  # a wrong shape, which is refused when the tensor is used
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
