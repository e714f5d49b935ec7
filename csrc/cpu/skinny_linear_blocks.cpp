// Weights in blocks of 32 features, sixteen rows of W in a group; ops/block_formats.py says how a group lies. Lanes are
// rows of W: a block's products are summed as integers, exactly, and its scale costs a multiply-add for all rows. x is
// rounded once per call: each 32 features of a row to 24 bits with a power of two as their scale.
//
// Row m of y: blocks one after the other, then y_scale, then the bias. Nothing else enters that order, and every
// instruction set with a fused multiply-add gives the same bits.
#include "../params.h"
#include "buffer.h"
#include "dot.h"
#include "parallel_for.h"

namespace speculative_mamba::SM_ISA {
namespace {

constexpr int kGroup = 16, kBlock = 32;
constexpr int kLine = 64;              // bytes to a multiple of which a group's scales are padded
constexpr int kPrefetch = 24 * kLine;  // ahead of the quants that are read
// Rows of x at a time: as many as the register file takes.
constexpr int kMaxTokens = kRows == 16 ? 6 : kRows == 8 ? 4 : 3;

// 32 features of a row of x: scale · v, and v in the parts that dot() takes.
struct Input {
    float scale;
    float sum;                // of v, rounded as total() rounds
    int32_t sums[3][kParts];  // of the parts: of both halves of the features, and of all
    part_t parts[kParts][kBlock];
};

inline float power_of_2(int exponent) {  // from -149 to 127
    const uint32_t bits = exponent < -126 ? 1u << (exponent + 149) : static_cast<uint32_t>(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

// The largest |v| is below 2^23 - 2^15 - 2^7, so that each part fits. To nearest, ties to even. What is not finite
// makes the block's products NaN.
inline void round_block(const float* x, Input& input) {
    int32_t v[kBlock] = {};
    uint32_t bits[kBlock], largest = 0;
    std::memcpy(bits, x, sizeof bits);
    for (int k = 0; k < kBlock; k++) {
        const uint32_t magnitude = bits[k] & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    // From 0xfefeff on, as a mantissa of 24 bits, half of it would be rounded to too much.
    const int exponent = static_cast<int>((largest + (0x1000000u - 0xfefeffu)) >> 23) - 127 - 22;  // of the scale
    input.scale = power_of_2(exponent);
    if (largest >= 0x7f800000u) {
        const uint32_t nan = 0x7fc00000u;
        std::memcpy(&input.scale, &nan, sizeof nan);
    } else {
        const float first = power_of_2(-exponent / 2), second = power_of_2(-exponent - -exponent / 2);
        for (int k = 0; k < kBlock; k++) {
            const float scaled = x[k] * first * second, big = scaled < 0 ? -0x1p23f : 0x1p23f;
            v[k] = static_cast<int32_t>(scaled + big - big);
        }
    }
    std::memset(input.sums, 0, sizeof input.sums);
    for (int k = 0; k < kBlock; k++) {
        const int place = k / 4 * 4 + kPlaces[k % 4];
        int32_t rest = v[k];
        for (int part = kParts - 1; part >= 0; part--) {
            const int32_t digit = part ? ((rest + 128) & 255) - 128 : rest;
            rest = (rest - digit) >> 8;
            input.parts[part][place] = static_cast<part_t>(digit);
            input.sums[k / 16][part] += digit;
        }
    }
    for (int part = 0; part < kParts; part++) input.sums[2][part] = input.sums[0][part] + input.sums[1][part];
    int32_t high = input.sums[2][0];
    if (kMultipliesBytes) high = high * 256 + input.sums[2][1];
    input.sum = static_cast<float>(high) * 256 + static_cast<float>(input.sums[2][kParts - 1]);
}

// Formats. kFeatures share kScaleBytes of scales in a group, and 32 have kQuantBytes; a block's sums are of kRuns equal
// parts of its features, each with a scale of its own. `weights` gives vector i of a block, four features of each row
// from `row` on, kZero above their value; `scaled` a run's sum without x's scale.

inline Bytes half_bytes(const uint8_t* quants, int i, int row) {
    const Bytes both = load_bytes(quants + i % 4 * kLine + 4 * row);
    return i < 4 ? bits<0>(both, 15) : bits<4>(both, 15);
}

struct OneScale {
    static constexpr int kFeatures = kBlock, kScaleBytes = 2 * kGroup, kRuns = 1;
    Floats scale;

    OneScale(const uint8_t* scales, int64_t block, int row)
        : scale(load_halves(scales + block * kScaleBytes + 2 * row)) {}
    Floats scaled(Floats sum, int, const Input&) const { return mul(sum, scale); }
};

struct Q8_0 : OneScale {
    static constexpr int kQuantBytes = 512, kZero = kExcess;
    using OneScale::OneScale;
    static Bytes weights(const uint8_t* quants, int i, int row) {
        return with_excess(load_bytes(quants + i * kLine + 4 * row));
    }
};

struct Q4_0 : OneScale {
    static constexpr int kQuantBytes = 256, kZero = 8;
    using OneScale::OneScale;
    static Bytes weights(const uint8_t* quants, int i, int row) { return half_bytes(quants, i, row); }
};

// Sixteen halves, twice, then for each 32 features sixteen bytes, twice.
struct Q4_K {
    static constexpr int kFeatures = 256, kScaleBytes = 4 * kGroup + 8 * 2 * kGroup, kQuantBytes = 256;
    static constexpr int kRuns = 1, kZero = 0;
    Floats scale, minimum;

    Q4_K(const uint8_t* scales, int64_t block, int row) {
        scales += block / 8 * kScaleBytes + row;
        const uint8_t* small = scales + 4 * kGroup + block % 8 * 2 * kGroup;
        scale = mul(load_halves(scales + row), load_unsigned(small));
        minimum = mul(load_halves(scales + 2 * kGroup + row), load_unsigned(small + kGroup));
    }
    Floats scaled(Floats sum, int, const Input& x) const { return fma(floats(-x.sum), minimum, mul(sum, scale)); }
    static Bytes weights(const uint8_t* quants, int i, int row) { return half_bytes(quants, i, row); }
};

// Sixteen halves, then for each 16 features sixteen bytes.
struct Q6_K {
    static constexpr int kFeatures = 256, kScaleBytes = 2 * kGroup + 8 * 2 * kGroup, kQuantBytes = 384;
    static constexpr int kRuns = 2, kZero = 32;
    Floats scale[kRuns];

    Q6_K(const uint8_t* scales, int64_t block, int row) {
        scales += block / 8 * kScaleBytes + row;
        const Floats large = load_halves(scales + row);
        for (int run = 0; run < kRuns; run++)
            scale[run] = mul(large, load_signed(scales + 2 * kGroup + (block % 8 * 2 + run) * kGroup));
    }
    Floats scaled(Floats sum, int run, const Input&) const { return mul(sum, scale[run]); }
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

// Adds a block's products with each of M rows of x.
template <typename Format, int M>
inline void add_block(const uint8_t* scales, int64_t block, int row, const uint8_t* quants, const Input* x,
                      int64_t x_stride, Floats (&totals)[M]) {
    constexpr int kVectors = 8 / Format::kRuns;
    const Format format(scales, block, row);
#pragma GCC unroll 2
    for (int run = 0; run < Format::kRuns; run++) {
        Ints sums[M][kParts];
        for (int m = 0; m < M; m++)
            for (int part = 0; part < kParts; part++)
                sums[m][part] = ints(-Format::kZero * x[m * x_stride].sums[Format::kRuns == 1 ? 2 : run][part]);
#pragma GCC unroll 8
        for (int i = run * kVectors; i < (run + 1) * kVectors; i++) {
            const Weights w = prepared(Format::weights(quants, i, row));
            for (int m = 0; m < M; m++)
                for (int part = 0; part < kParts; part++)
                    sums[m][part] = dot(sums[m][part], w, x[m * x_stride].parts[part] + 4 * i);
        }
        for (int m = 0; m < M; m++) {
            const Floats sum = format.scaled(total(sums[m]), run, x[m * x_stride]);
            totals[m] = fma(sum, floats(x[m * x_stride].scale), totals[m]);
        }
    }
}

// M rows of x from m0 on times a group of W.
template <typename Format, int M>
void group(const SkinnyLinearParams& p, const Input* x, int64_t m0, int64_t g) {
    const int64_t blocks = p.in_features / kBlock;
    const uint8_t* scales = static_cast<const uint8_t*>(p.weight) + g * p.weight_row_stride;
    const uint8_t* quants = scales + divide_up(p.in_features / Format::kFeatures * Format::kScaleBytes, kLine) * kLine;
    x += m0 * blocks;
    Floats totals[kGroup / kRows][M];
    for (auto& rows : totals)
        for (Floats& total : rows) total = floats(0);
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = quants + b * Format::kQuantBytes;
        for (int i = 0; i < Format::kQuantBytes; i += kLine) __builtin_prefetch(block + kPrefetch + i, 0, 3);
        for (int part = 0; part < kGroup / kRows; part++)
            add_block<Format, M>(scales, b, part * kRows, block, x + b, blocks, totals[part]);
    }
    const int64_t first = g * kGroup, count = min(kGroup, p.out_features - first);
    for (int m = 0; m < M; m++) {
        float y[kGroup];
        for (int part = 0; part < kGroup / kRows; part++) store_rows(y + part * kRows, totals[part][m]);
        for (int64_t n = 0; n < count; n++) {
            if (p.y_scale != 1) y[n] *= p.y_scale;
            p.y[(m0 + m) * p.out_features + first + n] = p.bias ? y[n] + p.bias[first + n] : y[n];
        }
    }
}

template <typename Format, int M>
void groups(const SkinnyLinearParams& p, const Input* x, int64_t m, int64_t first, int64_t last) {
    for (int64_t g = first; g < last; g++) group<Format, M>(p, x, m, g);
}

template <typename Format>
void run(const SkinnyLinearParams& p, int threads) {
    const int64_t blocks = p.in_features / kBlock, count = divide_up(p.out_features, kGroup);
    thread_local Buffer buffer;
    Input* const x = buffer.reserve<Input>(p.rows * blocks);
    for (int64_t m = 0; m < p.rows; m++)
        for (int64_t b = 0; b < blocks; b++) round_block(p.x + m * p.x_row_stride + b * kBlock, x[m * blocks + b]);
    // Chunks of about 64 KiB of weights, as for those that are no blocks.
    const int64_t bytes = p.weight_row_stride > 0 ? p.weight_row_stride : 1;
    const int64_t grain = min(divide_up(64 * 1024, bytes), divide_up(count, 2 * threads));
    parallel_for(count, grain > 0 ? grain : 1, p.rows * p.in_features * p.out_features, threads,
                 [&p, x](int64_t first, int64_t last) {
                     int64_t m = 0;
                     for (; m + kMaxTokens <= p.rows; m += kMaxTokens) groups<Format, kMaxTokens>(p, x, m, first, last);
                     switch (p.rows - m) {
                         case 1: return groups<Format, 1>(p, x, m, first, last);
                         case 2: return groups<Format, 2>(p, x, m, first, last);
                         case 3:
                             if constexpr (kMaxTokens > 3) return groups<Format, 3>(p, x, m, first, last);
                             break;
                         case 4:
                             if constexpr (kMaxTokens > 4) return groups<Format, 4>(p, x, m, first, last);
                             break;
                         case 5:
                             if constexpr (kMaxTokens > 5) return groups<Format, 5>(p, x, m, first, last);
                     }
                 });
}

}  // namespace

void skinny_linear_blocks(const SkinnyLinearParams& p, int threads) {
    switch (p.weight_dtype) {
        case DType::q8_0: return run<Q8_0>(p, threads);
        case DType::q4_0: return run<Q4_0>(p, threads);
        case DType::q4_k: return run<Q4_K>(p, threads);
        case DType::q6_k: return run<Q6_K>(p, threads);
        default: throw_unknown_dtype(p.weight_dtype);
    }
}

}  // namespace speculative_mamba::SM_ISA
