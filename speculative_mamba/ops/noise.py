"""Random numbers as a function of what they are for: Philox-4x32-10 (Salmon et al. 2011), in PyTorch.

The counter is (group of tokens, position in the text, stream, purpose), the key is the seed. No generator, no state:
any backend finds the same number without having drawn the ones before it.
"""

from enum import IntEnum

import torch

WORD = 0xFFFFFFFF


class Purpose(IntEnum):
    """Numbers of different purposes at one position are independent."""

    TOKEN = 0
    DRAFT = 1
    TEST = 2


def _product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a · b, both below 2³²; int64 cannot hold the product."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & WORD


def philox(counter: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
    """Four random words for each counter: (..., 4) int64 below 2³² → the same shape. seed: below 2⁶³, or (...)."""
    c0, c1, c2, c3 = counter.unbind(-1)
    key_low, key_high = seed & WORD, seed >> 32
    for _ in range(10):
        (high0, low0), (high2, low2) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key_low, low2, high0 ^ c3 ^ key_high, low0
        key_low, key_high = (key_low + 0x9E3779B9) & WORD, (key_high + 0xBB67AE85) & WORD
    return torch.stack([c0, c1, c2, c3], -1)


def uniform(key: list[int], position: int, purpose: Purpose) -> float:
    """In [0, 1), with 53 bits. key: seed and stream."""
    counter = [0, position & WORD, key[1] & WORD, int(purpose)]
    words = philox(torch.tensor(counter, dtype=torch.int64, device="cpu"), key[0]).tolist()
    return ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53


def exponentials(
    vocabulary: int, key: list[int], position: int, purpose: Purpose, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Independent exponential numbers (V) float64, one per token. Sixteen counters serve sixty-four tokens."""
    groups = torch.arange(-(-vocabulary // 64) * 16, dtype=torch.int64, device=device)
    rest = [position & WORD, key[1] & WORD, int(purpose)]
    rest = torch.tensor(rest, dtype=torch.int64, device=device).expand(len(groups), 3)
    words = philox(torch.cat([groups[:, None], rest], 1), key[0])
    bits = words.view(-1, 16, 4).transpose(1, 2).reshape(-1)[:vocabulary]
    return -torch.log1p(-(bits.double() + 0.5) * 2.0**-32)
