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
// Rows of x at a time, and registers of rows of W: as many as the register file takes.
constexpr int kMaxTokens = 5, kTiles = 2;

// 32 features of a row of x: scale · v, and v in the parts that dot() takes.
struct Input {
    float scale;
    float sum;  // of v, rounded as total() rounds
    // What sums of products are more than they should be, as weights lie above their value; of each run.
    struct {
        int32_t high, low;
    } above[2];
    part_t parts[kParts][kBlock];
};

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

inline float power_of_2(int exponent) {  // from -149 to 127
    const uint32_t bits = exponent < -126 ? 1u << (exponent + 149) : static_cast<uint32_t>(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

inline void store_part(const int32_t (&values)[kBlock], part_t (&part)[kBlock]) {
    for (int k = 0; k < kBlock; k += 4)
        for (int i = 0; i < 4; i++) part[k + kPlaces[i]] = static_cast<part_t>(values[k + i]);
}

inline int32_t sum_of_half(const int32_t* values) {
    int32_t sum = 0;
    for (int k = 0; k < kBlock / 2; k++) sum += values[k];
    return sum;
}

// The largest |v| is below 2^23 - 2^15 - 2^7, so that each part fits. To nearest, ties to even. What is not finite
// makes the block's products NaN.
template <typename Format>
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
    int32_t a[kBlock], b[kBlock], ab[kBlock], c[kBlock];
    for (int k = 0; k < kBlock; k++) c[k] = ((v[k] + 128) & 255) - 128;
    for (int k = 0; k < kBlock; k++) ab[k] = (v[k] - c[k]) >> 8;
    for (int k = 0; k < kBlock; k++) b[k] = ((ab[k] + 128) & 255) - 128;
    for (int k = 0; k < kBlock; k++) a[k] = (ab[k] - b[k]) >> 8;
    if (kMultipliesBytes) {
        store_part(a, input.parts[0]);
        store_part(b, input.parts[1]);
    } else {
        store_part(ab, input.parts[0]);
    }
    store_part(c, input.parts[kParts - 1]);
    const int32_t high[] = {sum_of_half(ab), sum_of_half(ab + kBlock / 2)};
    const int32_t low[] = {sum_of_half(c), sum_of_half(c + kBlock / 2)};
    const int32_t all_high = high[0] + high[1], all_low = low[0] + low[1];
    for (int run = 0; run < Format::kRuns; run++)
        input.above[run] = {-Format::kZero * (Format::kRuns == 1 ? all_high : high[run]),
                            -Format::kZero * (Format::kRuns == 1 ? all_low : low[run])};
    input.sum = static_cast<float>(all_high) * 256 + static_cast<float>(all_low);
}

// kRows rows of W: those of a group from `row` on.
struct Tile {
    const uint8_t *scales, *quants;
    int row;
};

// Adds a block's products with each of M rows of x. What is loaded of x serves all tiles.
template <typename Format, int M>
inline void add_block(const Tile (&tiles)[kTiles], int64_t block, const Input* x, int64_t x_stride,
                      Floats (&totals)[kTiles][M]) {
    constexpr int kVectors = 8 / Format::kRuns;
#pragma GCC unroll 2
    for (int run = 0; run < Format::kRuns; run++) {
        Weights w[kTiles][kVectors];
#pragma GCC unroll 2
        for (int t = 0; t < kTiles; t++)
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i++) {
                const uint8_t* quants = tiles[t].quants + block * Format::kQuantBytes;
                w[t][i] = prepared(Format::weights(quants, run * kVectors + i, tiles[t].row));
            }
        const auto add_part = [&](int part, Ints(&sums)[kTiles][M]) {
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i++)
                for (int m = 0; m < M; m++) {
                    const Four four = load_four(x[m * x_stride].parts[part] + 4 * (run * kVectors + i));
                    for (int t = 0; t < kTiles; t++) sums[t][m] = dot(sums[t][m], w[t][i], four);
                }
        };
        Ints high[kTiles][M], low[kTiles][M];
        for (int m = 0; m < M; m++)
            for (int t = 0; t < kTiles; t++) high[t][m] = ints(kMultipliesBytes ? 0 : x[m * x_stride].above[run].high);
        add_part(0, high);
        if constexpr (kMultipliesBytes) {
            for (int m = 0; m < M; m++)
                for (int t = 0; t < kTiles; t++)
                    high[t][m] = shifted(high[t][m], ints(x[m * x_stride].above[run].high));
            add_part(1, high);
        }
        for (int m = 0; m < M; m++)
            for (int t = 0; t < kTiles; t++) low[t][m] = ints(x[m * x_stride].above[run].low);
        add_part(kParts - 1, low);
        for (int t = 0; t < kTiles; t++) {
            const Format format(tiles[t].scales, block, tiles[t].row);
            for (int m = 0; m < M; m++) {
                const Floats sum = format.scaled(total(high[t][m], low[t][m]), run, x[m * x_stride]);
                totals[t][m] = fma(sum, floats(x[m * x_stride].scale), totals[t][m]);
            }
        }
    }
}

// M rows of x from m0 on times kTiles · kRows rows of W from n on.
template <typename Format, int M>
void multiply(const SkinnyLinearParams& p, const Input* x, int64_t m0, int64_t n) {
    const int64_t blocks = p.in_features / kBlock;
    const int64_t scale_bytes = divide_up(p.in_features / Format::kFeatures * Format::kScaleBytes, kLine) * kLine;
    const int64_t last = divide_up(p.out_features, kGroup) - 1;
    Tile tiles[kTiles];
    Floats totals[kTiles][M];
    for (int t = 0; t < kTiles; t++) {
        const int64_t first = n + t * kRows;
        // A group that does not exist is the last one once more.
        const uint8_t* group = static_cast<const uint8_t*>(p.weight) + min(first / kGroup, last) * p.weight_row_stride;
        tiles[t] = {group, group + scale_bytes, static_cast<int>(first % kGroup)};
        for (Floats& total : totals[t]) total = floats(0);
    }
    x += m0 * blocks;
    for (int64_t b = 0; b < blocks; b++) {
        for (int t = 0; t < kTiles; t += kRows < kGroup ? kTiles : 1)
            for (int i = 0; i < Format::kQuantBytes; i += kLine)
                __builtin_prefetch(tiles[t].quants + b * Format::kQuantBytes + kPrefetch + i, 0, 3);
        add_block<Format, M>(tiles, b, x + b, blocks, totals);
    }
    for (int t = 0; t < kTiles; t++) {
        const int64_t first = n + t * kRows;
        for (int m = 0; m < M; m++) {
            float y[kRows];
            store_rows(y, totals[t][m]);
            for (int64_t i = 0; i < kRows && first + i < p.out_features; i++) {
                if (p.y_scale != 1) y[i] *= p.y_scale;
                p.y[(m0 + m) * p.out_features + first + i] = p.bias ? y[i] + p.bias[first + i] : y[i];
            }
        }
    }
}

template <typename Format, int M>
void multiply_range(const SkinnyLinearParams& p, const Input* x, int64_t m, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n += kTiles * kRows) multiply<Format, M>(p, x, m, n);
}

template <typename Format>
void run(const SkinnyLinearParams& p, int threads) {
    const int64_t blocks = p.in_features / kBlock;
    thread_local Buffer buffer;
    Input* const x = buffer.reserve<Input>(p.rows * blocks);
    const int64_t inputs = p.rows * blocks, work_of_one = 16 * kBlock;
    parallel_for(inputs, divide_up(inputs, threads), inputs * work_of_one, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            round_block<Format>(p.x + i / blocks * p.x_row_stride + i % blocks * kBlock, x[i]);
    });
    // Chunks of about 64 KiB of weights, as for those that are no blocks.
    constexpr int64_t kStep = kTiles * kRows > kGroup ? kTiles * kRows : kGroup;
    const int64_t bytes = divide_up(p.weight_row_stride * kStep, kGroup);
    const int64_t grain = min(divide_up(64 * 1024, bytes), divide_up(p.out_features, 2 * threads * kStep)) * kStep;
    parallel_for(p.out_features, grain, p.rows * p.in_features * p.out_features, threads,
                 [&p, x](int64_t first, int64_t last) {
                     int64_t m = 0;
                     for (; m + kMaxTokens <= p.rows; m += kMaxTokens)
                         multiply_range<Format, kMaxTokens>(p, x, m, first, last);
                     switch (p.rows - m) {
                         case 1: return multiply_range<Format, 1>(p, x, m, first, last);
                         case 2: return multiply_range<Format, 2>(p, x, m, first, last);
                         case 3: return multiply_range<Format, 3>(p, x, m, first, last);
                         case 4: return multiply_range<Format, 4>(p, x, m, first, last);
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
