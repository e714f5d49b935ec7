// Rows of x for weights in blocks of 32 features. Each 32 features of a row are rounded to 24 bits, v, with a power of
// two as their scale; v is cut into the parts that a Dot takes.
#pragma once

#include <utility>

#include "dot.h"

namespace speculative_mamba::SM_ISA {

constexpr int kBlock = 32;
constexpr int kSlack = 1;  // rows of x behind the last one that a tile may take in

// What 32 features of a row have beside their parts.
struct InputBlock {
    float scale;
    float sum;  // of v, rounded as total() rounds
    // What sums of products are more than they should be, as weights lie above their value; of each run.
    struct {
        int32_t high, low;
    } above[2];
};

// M rows of K features: blocks (K/32, M), and their parts (K/32, M, parts, 32).
template <typename Dot>
struct BlockInputs {
    using part_t = typename Dot::part_t;
    static constexpr int kRowStride = Dot::kParts * kBlock;

    InputBlock* blocks;
    part_t* parts;
    int64_t rows;

    InputBlock* block(int64_t k, int64_t m) const { return blocks + k * rows + m; }
    part_t* part(int64_t k, int64_t m) const { return parts + (k * rows + m) * kRowStride; }
};

inline float power_of_2(int exponent) {  // from -149 to 127
    const uint32_t bits = exponent < -126 ? 1u << (exponent + 149) : static_cast<uint32_t>(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

// Vectors of as many lanes as a register has rows of W: a block is kVectors of them.
typedef float LaneFloats __attribute__((vector_size(4 * kRows)));
typedef int32_t LaneInts __attribute__((vector_size(4 * kRows)));
constexpr int kVectors = kBlock / kRows;

// op over all lanes, as a tree.
template <int kCount>
struct LanesOf {
    typedef int32_t type __attribute__((vector_size(4 * kCount)));
};
template <int kCount = kRows, typename Op>
inline int32_t folded(const void* lanes, const Op& op) {
    typename LanesOf<kCount / 2>::type halves[2];
    std::memcpy(halves, lanes, sizeof halves);
    halves[0] = op(halves[0], halves[1]);
    if constexpr (kCount > 2) return folded<kCount / 2>(halves, op);
    int32_t lane;
    std::memcpy(&lane, halves, sizeof lane);
    return lane;
}

template <int kCount>
inline int32_t sum_of(const LaneInts* v) {
    LaneInts sum = v[0];
    for (int i = 1; i < kCount; i++) sum += v[i];
    return folded(&sum, [](auto a, auto b) { return a + b; });
}

// What is left of numbers from -2^15 to 2^23 as a multiple of 256, and the rest, from -128 to 127.
inline LaneInts last_digit(LaneInts v) { return ((v + 128) & 255) - 128; }
inline LaneInts without(LaneInts v, LaneInts digit) { return (v - digit) >> 8; }

template <typename Dot>
inline void store_part(const LaneInts (&values)[kVectors], typename Dot::part_t* part) {
    typedef typename Dot::part_t LaneParts __attribute__((vector_size(kRows * sizeof(typename Dot::part_t))));
    for (int i = 0; i < kVectors; i++) {
        const LaneParts narrow = __builtin_convertvector(values[i], LaneParts);
        std::memcpy(part + i * kRows, &narrow, sizeof narrow);
    }
    if constexpr (Dot::kEvenFirst)
        for (int k = 0; k < kBlock; k += 4) std::swap(part[k + 1], part[k + 2]);
}

// The largest |v| is below 2^23 - 2^15 - 2^7, so that each part fits. To nearest, ties to even. What is not finite
// makes the block's products NaN. Weights lie kZero above their value.
template <typename Dot, int kRuns, int kZero>
inline void round_block(const float* x, InputBlock& block, typename Dot::part_t* parts) {
    static_assert(kVectors % kRuns == 0, "a run is whole vectors");
    LaneFloats v[kVectors];
    std::memcpy(v, x, sizeof v);
    LaneInts magnitudes = {};
    for (const LaneFloats& some : v) {
        const LaneInts bits = (LaneInts)some & 0x7fffffff;
        magnitudes = bits > magnitudes ? bits : magnitudes;
    }
    const uint32_t largest = folded(&magnitudes, [](auto a, auto b) { return a > b ? a : b; });
    // From 0xfefeff on, as a mantissa of 24 bits, half of it would be rounded to too much.
    const int exponent = static_cast<int>((largest + (0x1000000u - 0xfefeffu)) >> 23) - 127 - 22;  // of the scale
    block.scale = power_of_2(exponent);
    if (largest >= 0x7f800000u) {
        const uint32_t nan = 0x7fc00000u;
        std::memcpy(&block.scale, &nan, sizeof nan);
        std::memset(v, 0, sizeof v);
    }
    const float first = power_of_2(-exponent / 2), second = power_of_2(-exponent - -exponent / 2);
    LaneInts ab[kVectors], c[kVectors];
    for (int i = 0; i < kVectors; i++) {
        const LaneFloats scaled = v[i] * first * second;
        const LaneFloats big = (LaneFloats)(((LaneInts)scaled & INT32_MIN) | 0x4b000000);  // 2^23 with its sign
        const LaneInts whole = __builtin_convertvector(scaled + big - big, LaneInts);
        c[i] = last_digit(whole);
        ab[i] = without(whole, c[i]);
    }
    if constexpr (Dot::kParts == 3) {
        LaneInts a[kVectors], b[kVectors];
        for (int i = 0; i < kVectors; i++) {
            b[i] = last_digit(ab[i]);
            a[i] = without(ab[i], b[i]);
        }
        store_part<Dot>(a, parts);
        store_part<Dot>(b, parts + kBlock);
    } else {
        store_part<Dot>(ab, parts);
    }
    store_part<Dot>(c, parts + (Dot::kParts - 1) * kBlock);
    int32_t all_high = 0, all_low = 0;
    for (int run = 0; run < kRuns; run++) {
        constexpr int kCount = kVectors / kRuns;
        const int32_t high = sum_of<kCount>(ab + run * kCount), low = sum_of<kCount>(c + run * kCount);
        block.above[run] = {-kZero * high, -kZero * low};
        all_high += high;
        all_low += low;
    }
    block.sum = static_cast<float>(all_high) * 256 + static_cast<float>(all_low);
}

}  // namespace speculative_mamba::SM_ISA
