// What rows of x are multiplied with: rows of W in blocks.
#pragma once

#include "block_formats.h"
#include "parallel_for.h"

namespace speculative_mamba::SM_ISA {

constexpr int kMaxTokens = 16;         // rows of x that share a pass over W
constexpr int kPrefetch = 24 * kLine;  // ahead of the quants that are read

// Where x (M, K) and W (N, K) lie.
template <typename Format>
struct BlockOperands {
    using Dot = DotOf<Format::kLargest>;

    BlockInputs<Dot> x;
    const uint8_t* weight;
    int64_t group_stride;  // in bytes
    int64_t in_features, out_features;

    const uint8_t* group(int64_t n) const { return weight + n / kGroup * group_stride; }
    // Where quants begin in a group.
    int64_t quants_at() const {
        return divide_up(in_features / Format::kFeatures * Format::kScaleBytes, kLine) * kLine;
    }
};

// Fetches what will be read after the quants of a block.
template <typename Format>
inline void prefetch_quants(const uint8_t* quants) {
    for (int i = 0; i < Format::kQuantBytes; i += kLine) __builtin_prefetch(quants + kPrefetch + i, 0, 3);
}

// A sum of products from those with 2^8 a + b and with c: rounded to float where it has more than 24 bits.
inline Floats total(Ints high, Ints low) { return fma(to_floats(high), floats(256), to_floats(low)); }

}  // namespace speculative_mamba::SM_ISA
