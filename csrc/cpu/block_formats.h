// Weights in blocks of 32 features, sixteen rows of W in a group; ops/block_formats.py says how a group lies.
#pragma once

#include "block_inputs.h"

namespace speculative_mamba::SM_ISA {

constexpr int kGroup = 16;
constexpr int kLine = 64;  // bytes to a multiple of which a group's scales are padded

// Formats. kFeatures share kScaleBytes of scales in a group, and 32 have kQuantBytes; a block's sums are of kRuns equal
// parts of its features, each with a scale of its own. `weights` gives vector i of a block, four features of each row
// from `row` on, kZero above their value and at most kLargest; `scaled` a run's sum without x's scale. Where kBytes,
// quants are these vectors.

inline Bytes half_bytes(const uint8_t* quants, int i, int row) {
    const Bytes both = load_bytes(quants + i % 4 * kLine + 4 * row);
    return i < 4 ? bits<0>(both, 15) : bits<4>(both, 15);
}

struct OneScale {
    static constexpr int kFeatures = kBlock, kScaleBytes = 2 * kGroup, kRuns = 1;
    Floats scale;

    OneScale() = default;
    OneScale(const uint8_t* scales, int64_t block, int row)
        : scale(load_halves(scales + block * kScaleBytes + 2 * row)) {}
    Floats scaled(Floats sum, int, const InputBlock&) const { return mul(sum, scale); }
};

struct Q8_0 : OneScale {
    static constexpr bool kBytes = true;
    static constexpr int kQuantBytes = 512, kZero = kExcess, kLargest = 255;
    using OneScale::OneScale;
    static Bytes weights(const uint8_t* quants, int i, int row) {
        return with_excess(load_bytes(quants + i * kLine + 4 * row));
    }
};

struct Q4_0 : OneScale {
    static constexpr bool kBytes = false;
    static constexpr int kQuantBytes = 256, kZero = 8, kLargest = 15;
    using OneScale::OneScale;
    static Bytes weights(const uint8_t* quants, int i, int row) { return half_bytes(quants, i, row); }
};

// Sixteen halves, twice, then for each 32 features sixteen bytes, twice.
struct Q4_K {
    static constexpr bool kBytes = false;
    static constexpr int kFeatures = 256, kScaleBytes = 4 * kGroup + 8 * 2 * kGroup, kQuantBytes = 256;
    static constexpr int kRuns = 1, kZero = 0, kLargest = 15;
    Floats scale, minimum;

    Q4_K() = default;
    Q4_K(const uint8_t* scales, int64_t block, int row) {
        scales += block / 8 * kScaleBytes + row;
        const uint8_t* small = scales + 4 * kGroup + block % 8 * 2 * kGroup;
        scale = mul(load_halves(scales + row), load_unsigned(small));
        minimum = mul(load_halves(scales + 2 * kGroup + row), load_unsigned(small + kGroup));
    }
    Floats scaled(Floats sum, int, const InputBlock& x) const { return fma(floats(-x.sum), minimum, mul(sum, scale)); }
    static Bytes weights(const uint8_t* quants, int i, int row) { return half_bytes(quants, i, row); }
};

// Sixteen halves, then for each 16 features sixteen bytes.
struct Q6_K {
    static constexpr bool kBytes = false;
    static constexpr int kFeatures = 256, kScaleBytes = 2 * kGroup + 8 * 2 * kGroup, kQuantBytes = 384;
    static constexpr int kRuns = 2, kZero = 32, kLargest = 63;
    Floats scale[kRuns];

    Q6_K() = default;
    Q6_K(const uint8_t* scales, int64_t block, int row) {
        scales += block / 8 * kScaleBytes + row;
        const Floats large = load_halves(scales + row);
        for (int run = 0; run < kRuns; run++)
            scale[run] = mul(large, load_signed(scales + 2 * kGroup + (block % 8 * 2 + run) * kGroup));
    }
    Floats scaled(Floats sum, int run, const InputBlock&) const { return mul(sum, scale[run]); }
    static Bytes weights(const uint8_t* quants, int i, int row) {
        const Bytes pairs = load_bytes(quants + (4 + i / 4) * kLine + 4 * row), low = half_bytes(quants, i, row);
        switch (i % 4) {
            case 0: return with_upper(low, bits<0>(pairs, 3));
            case 1: return with_upper(low, bits<2>(pairs, 3));
            case 2: return with_upper(low, bits<4>(pairs, 3));
            default: return with_upper(low, bits<6>(pairs, 3));
        }
    }
};

}  // namespace speculative_mamba::SM_ISA
