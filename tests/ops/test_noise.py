"""Philox-4x32-10: the published numbers, the same ones in PyTorch and in C++, and no trace of where they come from.

The C++ numbers are seen through what they decide. Statistics have fixed seeds and thresholds of one in a million.
"""

import functools
import math

import pytest
import torch

from speculative_mamba.ops import sample_tokens, speculative_accept
from speculative_mamba.ops.noise import WORD, Purpose, exponentials, philox, uniform
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors
from speculative_mamba.testing.sampling import tensors

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62 + 3, 2**63 - 1]
STREAMS = [0, 1, 63, 2**31 + 5]
POSITIONS = [0, 1, 4095, 2**31 - 1, 2**31, 2**32 - 1]
NATURAL = SamplingParams(temperature=1.0)


def natural(logits: torch.Tensor) -> SamplingTensors:
    return tensors(NATURAL, len(logits), logits.shape[-1])


# Random123's kat_vectors: counter, key, result.
KNOWN = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0_A4093822,
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]  # fmt: skip


def keys_and_positions() -> tuple[torch.Tensor, torch.Tensor]:
    """Every combination, and further ones at random: (B, 2) and (B)."""
    rows = [(seed, stream, position) for seed in SEEDS for stream in STREAMS for position in POSITIONS]
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([2**62, 2**31, 2**31])
    table = torch.cat([torch.tensor(rows), (torch.rand(60, 3, generator=generator) * ends).long()])
    return table[:, :2].contiguous(), table[:, 2].contiguous()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: list[int], key: int, expected: list[int]) -> None:
    """Catches: nine rounds of Philox."""
    assert philox(torch.tensor(counter), key).tolist() == expected


def test_a_key_per_counter() -> None:
    """Catches: half of the seed ignored."""
    counters = torch.tensor([KNOWN[0][0], KNOWN[2][0]])
    words = philox(counters, torch.tensor([KNOWN[0][1], KNOWN[2][1]]))
    assert words.tolist() == [KNOWN[0][2], KNOWN[2][2]]
    many = philox(torch.tensor([KNOWN[2][0]]).expand(3, 5, 4), KNOWN[2][1])
    assert many.shape == (3, 5, 4) and (many == torch.tensor(KNOWN[2][2])).all()


@pytest.mark.parametrize("purpose", Purpose)
def test_numbers_come_from_the_documented_words(purpose: Purpose) -> None:
    """Token t reads word t // 16 % 4 of counter (t // 64 * 16 + t % 16, position, stream, purpose) under the seed."""
    seed, stream, position = 2**63 - 1, 9, 2**32 - 1
    numbers = exponentials(200, [seed, stream], position, purpose)
    assert numbers.dtype == torch.float64 and numbers.shape == (200,)
    for token in (0, 1, 15, 16, 63, 64, 130, 199):
        words = philox(torch.tensor([token // 64 * 16 + token % 16, position, stream, int(purpose)]), seed).tolist()
        fraction = (words[token // 16 % 4] + 0.5) / 2**32
        assert numbers[token].item() == pytest.approx(-math.log1p(-fraction), rel=1e-14)
    words = philox(torch.tensor([0, position, stream, int(purpose)]), seed).tolist()
    assert uniform([seed, stream], position, purpose) == ((words[0] << 32 | words[1]) >> 11) / 2**53


@functools.cache
def specified(vocabulary: int) -> tuple[tuple, list[torch.Tensor]]:
    """What to draw from, and the reference's tokens for every purpose."""
    keys, positions = keys_and_positions()
    logits = torch.randn(len(keys), vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    given = logits, natural(logits), keys, positions
    return given, [sample_tokens(*given, purpose, backend="reference") for purpose in Purpose]


@pytest.mark.parametrize("vocabulary", [1, 5, 63, 64, 65, 129, 1000])
def test_the_kernels_draw_the_tokens_of_the_specification(vocabulary: int, kernels: str) -> None:
    given, tokens = specified(vocabulary)
    for purpose, expected in zip(Purpose, tokens, strict=True):
        assert torch.equal(sample_tokens(*given, purpose, backend=kernels), expected)
        assert vocabulary == 1 or len(expected.unique()) > min(vocabulary, 50) / 2


def test_a_large_vocabulary(kernels: str) -> None:
    keys, positions = keys_and_positions()
    keys, positions = keys[::8].contiguous(), positions[::8].contiguous()
    for spread in (0.0, 3.0):
        logits = torch.randn(1, 50280, generator=torch.Generator().manual_seed(1)).mul(spread).expand(len(keys), -1)
        expected = sample_tokens(logits, natural(logits), keys, positions, backend="reference")
        assert torch.equal(sample_tokens(logits, natural(logits), keys, positions, backend=kernels), expected)


def test_the_kernels_exponentials_to_five_digits(kernels: str) -> None:
    """Of two tokens whose odds are those of their numbers, up to 1e-5, the favoured one is drawn."""
    vocabulary, key, position = 517, [2**62 + 3, 7], 2**31 + 1
    numbers = exponentials(vocabulary, key, position, Purpose.DRAFT)
    others = torch.arange(1, vocabulary)
    rows = vocabulary - 1
    keys, positions = torch.tensor([key] * rows), torch.full((rows,), position)
    for slant, expected in ((1e-5, others), (-1e-5, torch.zeros_like(others))):
        logits = torch.full((rows, vocabulary), -torch.inf)
        logits[:, 0] = 0
        logits[torch.arange(rows), others] = ((numbers[1:] / numbers[0]).log() + slant).float()
        assert torch.equal(
            sample_tokens(logits, natural(logits), keys, positions, Purpose.DRAFT, backend=kernels), expected
        )


def test_the_kernels_uniform_numbers_to_five_digits(backend: str) -> None:
    """A certain token stands if the number is below its probability; probabilities lie 1e-5 beside the number."""
    keys, positions = keys_and_positions()
    numbers = [uniform(key, at, Purpose.TEST) for key, at in zip(keys.tolist(), positions.tolist(), strict=True)]
    u = torch.tensor(numbers, dtype=torch.float64)
    for slant, expected in ((1 + 1e-5, 1), (1 - 1e-5, 0)):
        p = u * slant
        logits = torch.stack([p.log(), torch.log1p(-p)], 1).float()[:, None].expand(-1, 2, -1)
        drafted = torch.zeros(len(keys), 1, dtype=torch.int64)
        accepted, _ = speculative_accept(logits, drafted, None, natural(logits), keys, positions, backend=backend)
        assert accepted.tolist() == [expected] * len(keys)


def chi_square_tail(statistic: float, freedom: float) -> float:
    """Probability of a larger statistic."""
    return torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()).item()


def test_uniform_numbers_are_uniform() -> None:
    numbers = [uniform([0, row], at, Purpose.TEST) for row in range(40) for at in range(25)]
    assert min(numbers) >= 0 and max(numbers) < 1
    counts = torch.histc(torch.tensor(numbers), 20, 0, 1)
    assert chi_square_tail(((counts - 50) ** 2 / 50).sum().item(), 19) > 1e-6


def test_exponentials_are_exponential() -> None:
    numbers = exponentials(100_000, [3, 1], 17, Purpose.TOKEN)
    assert numbers.min() > 0 and numbers.isfinite().all()
    assert abs(numbers.mean().item() - 1) < 5 / 100_000**0.5
    assert abs(numbers.var().item() - 1) < 5 * (8 / 100_000) ** 0.5  # the fourth central moment is 9
    counts = torch.histc(1 - (-numbers).exp(), 100, 0, 1)
    assert chi_square_tail(((counts - 1000) ** 2 / 1000).sum().item(), 99) > 1e-6


OTHERS = {
    "seed": ([6, 1], 17, Purpose.TOKEN),
    "upper half of the seed": ([5 + 2**32, 1], 17, Purpose.TOKEN),
    "stream": ([5, 2], 17, Purpose.TOKEN),
    "position": ([5, 1], 18, Purpose.TOKEN),
    "far position": ([5, 1], 17 + 2**31, Purpose.TOKEN),
    "draft": ([5, 1], 17, Purpose.DRAFT),
    "test": ([5, 1], 17, Purpose.TEST),
    "position and stream exchanged": ([5, 17], 1, Purpose.TOKEN),
}


@pytest.mark.parametrize("other", OTHERS)
def test_numbers_for_different_things_are_uncorrelated(other: str) -> None:
    """Catches: a row's index left out of its key."""
    count = 20_000
    ours = exponentials(count, [5, 1], 17, Purpose.TOKEN)
    theirs = exponentials(count, *OTHERS[other])
    for shift in (0, 1, 16, 64):
        correlation = torch.corrcoef(torch.stack([ours, theirs.roll(shift)]))[0, 1].item()
        assert abs(correlation) < 5 / count**0.5
    assert not (ours == theirs).sum() > 2


@pytest.mark.parametrize("distance", [1, 15, 16, 48, 63, 64, 1024])
def test_numbers_of_different_tokens_are_uncorrelated(distance: int) -> None:
    numbers = exponentials(20_000, [5, 1], 17, Purpose.TOKEN)
    correlation = torch.corrcoef(torch.stack([numbers, numbers.roll(distance)]))[0, 1].item()
    assert abs(correlation) < 5 / 20_000**0.5


def test_drawn_tokens_of_neighbouring_rows_and_positions_are_independent(kernels: str) -> None:
    """Pairs of tokens of four tokens of equal probability, by chi-square on the sixteen pairs."""
    rows = 16_000
    logits = torch.zeros(1, 4).expand(rows, 4)
    streams, zeros = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    base = torch.stack([zeros, streams], 1), zeros, Purpose.TOKEN
    variants = {
        "next row": (torch.stack([zeros, streams + 1], 1), zeros, Purpose.TOKEN),
        "next position": (base[0], zeros + 1, Purpose.TOKEN),
        "next seed": (torch.stack([zeros + 1, streams], 1), zeros, Purpose.TOKEN),
        "draft": (base[0], zeros, Purpose.DRAFT),
    }
    first = sample_tokens(logits, natural(logits), *base, backend=kernels)
    for name, variant in variants.items():
        pairs = torch.bincount(
            first * 4 + sample_tokens(logits, natural(logits), *variant, backend=kernels), minlength=16
        )
        statistic = ((pairs - rows / 16) ** 2 / (rows / 16)).sum().item()
        assert chi_square_tail(statistic, 15) > 1e-6, name


def test_the_global_generator_is_left_alone(backend: str) -> None:
    logits, keys, positions = torch.randn(3, 2, 7), torch.zeros(3, 2, dtype=torch.int64), torch.arange(3)
    before = torch.get_rng_state()
    first = sample_tokens(logits[:, 0], natural(logits[:, 0]), keys, positions, backend=backend)
    speculative_accept(logits, first[:, None], None, natural(logits), keys, positions, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(sample_tokens(logits[:, 0], natural(logits[:, 0]), keys, positions, backend=backend), first)
