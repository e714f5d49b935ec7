// Rows of x for weights in blocks of 32 features. Each 32 features of a row are rounded to 24 bits, v, with a power of
// two as their scale; v is cut into the parts that a Dot takes.
#pragma once

#include "dot.h"

namespace speculative_mamba::SM_ISA {

constexpr int kBlock = 32;
constexpr int kPartStride = 2 * kBlock;  // from a part of a row of x to its next one

// What 32 features of a row have beside their parts.
struct InputBlock {
    float scale;
    float sum;  // of v, rounded as total() rounds
    // What sums of products are more than they should be, as weights lie above their value; of each run.
    struct {
        int32_t high, low;
    } above[2];
};

// M rows of K features: blocks (K/32, M), and their parts (K/64, M, parts, 64). So a row of a tile of 64 bytes is a
// part of two blocks.
template <typename Dot>
struct BlockInputs {
    using part_t = typename Dot::part_t;
    static constexpr int kRowStride = Dot::kParts * kPartStride;

    InputBlock* blocks;
    part_t* parts;
    int64_t rows;

    InputBlock* block(int64_t k, int64_t m) const { return blocks + k * rows + m; }
    part_t* part(int64_t k, int64_t m) const { return parts + (k / 2 * rows + m) * kRowStride + k % 2 * kBlock; }
};

inline float power_of_2(int exponent) {  // from -149 to 127
    const uint32_t bits = exponent < -126 ? 1u << (exponent + 149) : static_cast<uint32_t>(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

template <typename Dot>
inline void store_part(const int32_t (&values)[kBlock], typename Dot::part_t* part) {
    for (int k = 0; k < kBlock; k += 4)
        for (int i = 0; i < 4; i++) part[k + Dot::kPlaces[i]] = static_cast<typename Dot::part_t>(values[k + i]);
}

inline int32_t sum_of_half(const int32_t* values) {
    int32_t sum = 0;
    for (int k = 0; k < kBlock / 2; k++) sum += values[k];
    return sum;
}

// The largest |v| is below 2^23 - 2^15 - 2^7, so that each part fits. To nearest, ties to even. What is not finite
// makes the block's products NaN. Weights lie kZero above their value.
template <typename Dot, int kRuns, int kZero>
inline void round_block(const float* x, InputBlock& block, typename Dot::part_t* parts) {
    int32_t v[kBlock] = {};
    uint32_t bits[kBlock], largest = 0;
    std::memcpy(bits, x, sizeof bits);
    for (int k = 0; k < kBlock; k++) {
        const uint32_t magnitude = bits[k] & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    // From 0xfefeff on, as a mantissa of 24 bits, half of it would be rounded to too much.
    const int exponent = static_cast<int>((largest + (0x1000000u - 0xfefeffu)) >> 23) - 127 - 22;  // of the scale
    block.scale = power_of_2(exponent);
    if (largest >= 0x7f800000u) {
        const uint32_t nan = 0x7fc00000u;
        std::memcpy(&block.scale, &nan, sizeof nan);
    } else {
        const float first = power_of_2(-exponent / 2), second = power_of_2(-exponent - -exponent / 2);
        for (int k = 0; k < kBlock; k++) {
            const float scaled = x[k] * first * second, big = scaled < 0 ? -0x1p23f : 0x1p23f;
            v[k] = static_cast<int32_t>(scaled + big - big);
        }
    }
    int32_t a[kBlock], b[kBlock], ab[kBlock], c[kBlock];
    for (int k = 0; k < kBlock; k++) c[k] = ((v[k] + 128) & 255) - 128;
    for (int k = 0; k < kBlock; k++) ab[k] = (v[k] - c[k]) >> 8;
    for (int k = 0; k < kBlock; k++) b[k] = ((ab[k] + 128) & 255) - 128;
    for (int k = 0; k < kBlock; k++) a[k] = (ab[k] - b[k]) >> 8;
    if constexpr (Dot::kParts == 3) {
        store_part<Dot>(a, parts);
        store_part<Dot>(b, parts + kPartStride);
    } else {
        store_part<Dot>(ab, parts);
    }
    store_part<Dot>(c, parts + (Dot::kParts - 1) * kPartStride);
    const int32_t high[] = {sum_of_half(ab), sum_of_half(ab + kBlock / 2)};
    const int32_t low[] = {sum_of_half(c), sum_of_half(c + kBlock / 2)};
    const int32_t all_high = high[0] + high[1], all_low = low[0] + low[1];
    for (int run = 0; run < kRuns; run++)
        block.above[run] = {-kZero * (kRuns == 1 ? all_high : high[run]), -kZero * (kRuns == 1 ? all_low : low[run])};
    block.sum = static_cast<float>(all_high) * 256 + static_cast<float>(all_low);
}

}  // namespace speculative_mamba::SM_ISA
