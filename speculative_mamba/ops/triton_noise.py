"""The numbers of ``noise`` in Triton. ``seed``, ``stream`` and ``position`` are int64."""

import triton
import triton.language as tl


@triton.jit
def _words(group, seed, stream, position, purpose):
    return tl.philox(seed, group.to(tl.uint32), position.to(tl.uint32), stream.to(tl.uint32), purpose)


@triton.jit
def bits_of(token, seed, stream, position, purpose):
    """Random 32 bits of each token: sixteen counters serve sixty-four tokens."""
    first, second, third, fourth = _words(token // 64 * 16 + token % 16, seed, stream, position, purpose)
    word = token // 16 % 4
    return tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))


@triton.jit
def uniform(seed, stream, position, purpose):
    """float64 in [0, 1), with 53 bits."""
    first, second, _, _ = _words(tl.zeros((), tl.int32), seed, stream, position, purpose)
    return ((first.to(tl.uint64) << 21) | (second >> 11).to(tl.uint64)).to(tl.float64) * 2.0**-53
