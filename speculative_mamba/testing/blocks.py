"""Random weights as a GGUF file has them."""

import torch

from ..ops.block_formats import FORMATS

_SCALES = {"q8_0": (0,), "q4_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}  # bytes of a block at which a half lies


def random_blocks(N: int, K: int, format: str, seed: int = 0) -> torch.Tensor:
    """(N, bytes of a row) uint8 in any format: every bit is random but the scales, which are from 0.001 to 0.01."""
    kind, generator = FORMATS[format], torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (N, K // kind.features, kind.block_bytes), generator=generator).to(torch.uint8)
    for at in _SCALES[format]:
        scales = torch.rand(*blocks.shape[:2], 1, generator=generator) * 0.009 + 0.001
        blocks[..., at : at + 2] = scales.half().view(torch.uint8)
    return blocks.flatten(1)
