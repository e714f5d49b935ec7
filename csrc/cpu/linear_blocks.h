// Rows of x times rows of W in blocks. Lanes are rows of W: a block's products are summed as integers, exactly, and its
// scale costs a multiply-add for all rows.
//
// An output: blocks one after the other. Nothing else enters that order, and every instruction set with a fused
// multiply-add gives the same bits.
#pragma once

#include "block_formats.h"
#include "buffer.h"
#include "parallel_for.h"

namespace speculative_mamba::SM_ISA {

constexpr int kMaxTokens = 16;         // rows of x that share a pass over W
constexpr int kPrefetch = 24 * kLine;  // ahead of the quants that are read
// A pass goes through kSpan rows of W. kTiles · kRows of them at a time are multiplied with one row of x after the
// other: what is loaded of x serves all tiles.
constexpr int kTiles = 2, kSpan = kTiles * kRows > kGroup ? kTiles * kRows : kGroup;

// Where x (M, K) and W (N, K) lie.
template <typename Format>
struct BlockOperands {
    using Dot = DotOf<Format::kLargest>;

    BlockInputs<Dot> x;
    const uint8_t* weight;
    int64_t group_stride;  // in bytes
    int64_t in_features, out_features;
};

// A sum of products from those with 2^8 a + b and with c: rounded to float where it has more than 24 bits.
inline Floats total(Ints high, Ints low) { return fma(to_floats(high), floats(256), to_floats(low)); }

// Adds a run's products with a row of x to its totals.
template <typename Format, typename Weights, typename part_t>
inline void add_products(const Weights (&w)[kTiles][8 / Format::kRuns], const Format (&formats)[kTiles], int run,
                         const InputBlock& block, const part_t* parts, float* totals) {
    using Dot = DotOf<Format::kLargest>;
    constexpr int kVectors = 8 / Format::kRuns;
    const auto above = block.above[run];
    typename Dot::Sum sums[Dot::kParts][kTiles];
    for (int t = 0; t < kTiles; t++) {
        sums[0][t] = Dot::start(0);
        sums[Dot::kParts - 2][t] = Dot::start(above.high);
        sums[Dot::kParts - 1][t] = Dot::start(above.low);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++)
#pragma GCC unroll 3
        for (int part = 0; part < Dot::kParts; part++) {
            const auto four = Dot::load_four(parts + part * kPartStride + 4 * (run * kVectors + i));
            for (int t = 0; t < kTiles; t++) sums[part][t] = Dot::add(sums[part][t], w[t][i], four);
        }
    for (int t = 0; t < kTiles; t++) {
        Ints high = Dot::finished(sums[Dot::kParts - 2][t], above.high);
        if constexpr (Dot::kParts == 3) high = shifted(Dot::finished(sums[0][t], 0), high);
        const Ints low = Dot::finished(sums[Dot::kParts - 1][t], above.low);
        const Floats sum = formats[t].scaled(total(high, low), run, block);
        store_rows(totals + t * kRows, fma(sum, floats(block.scale), load_rows(totals + t * kRows)));
    }
}

// `count` rows of x from m0 on times kSpan rows of W from n on: calls store(m, n, sum) for each product.
template <typename Format, typename Store>
void multiply_span(const BlockOperands<Format>& p, int64_t m0, int count, int64_t n, const Store& store) {
    using Dot = DotOf<Format::kLargest>;
    using Inputs = BlockInputs<Dot>;
    constexpr int kVectors = 8 / Format::kRuns, kGroups = kSpan / kGroup;
    const int64_t scale_bytes = divide_up(p.in_features / Format::kFeatures * Format::kScaleBytes, kLine) * kLine;
    const int64_t last = divide_up(p.out_features, kGroup) - 1;
    const uint8_t* groups[kGroups];
    // A group that does not exist is the last one once more.
    for (int g = 0; g < kGroups; g++) groups[g] = p.weight + min(n / kGroup + g, last) * p.group_stride;
    alignas(64) float totals[kMaxTokens * kSpan];
    for (int i = 0; i < count * kSpan; i++) totals[i] = 0;
    for (int64_t b = 0; b < p.in_features / kBlock; b++) {
        for (int g = 0; g < kGroups; g++)
            for (int i = 0; i < Format::kQuantBytes; i += kLine)
                __builtin_prefetch(groups[g] + scale_bytes + b * Format::kQuantBytes + kPrefetch + i, 0, 3);
        const InputBlock* const blocks = p.x.block(b, m0);
        const typename Dot::part_t* const parts = p.x.part(b, m0);
        for (int row = 0; row < kSpan; row += kTiles * kRows) {
            const auto group = [&](int t) { return groups[(row + t * kRows) / kGroup]; };
            const auto in_group = [&](int t) { return (row + t * kRows) % kGroup; };
            Format formats[kTiles];
            for (int t = 0; t < kTiles; t++) formats[t] = Format(group(t), b, in_group(t));
            for (int run = 0; run < Format::kRuns; run++) {
                typename Dot::Weights w[kTiles][kVectors];
                for (int t = 0; t < kTiles; t++)
#pragma GCC unroll 8
                    for (int i = 0; i < kVectors; i++)
                        w[t][i] = Dot::prepared(Format::weights(group(t) + scale_bytes + b * Format::kQuantBytes,
                                                                run * kVectors + i, in_group(t)));
                for (int m = 0; m < count; m++)
                    add_products(w, formats, run, blocks[m], parts + m * Inputs::kRowStride, totals + m * kSpan + row);
            }
        }
    }
    for (int m = 0; m < count; m++)
        for (int64_t i = 0; i < kSpan && n + i < p.out_features; i++) store(m0 + m, n + i, totals[m * kSpan + i]);
}

// Rounds rows of x, of which row_of(m) tells where it begins.
template <typename Format, typename RowOf>
BlockInputs<DotOf<Format::kLargest>> rounded_rows(int64_t rows, int64_t in_features, int threads, const RowOf& row_of) {
    using Dot = DotOf<Format::kLargest>;
    using Inputs = BlockInputs<Dot>;
    thread_local Buffer blocks, parts;
    const int64_t count = in_features / kBlock, inputs = rows * count, work_of_one = 16 * kBlock;
    const Inputs x{blocks.reserve<InputBlock>(inputs),
                   parts.reserve<typename Dot::part_t>(divide_up(count, 2) * rows * Inputs::kRowStride), rows};
    parallel_for(inputs, divide_up(inputs, threads), inputs * work_of_one, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t k = i / rows, m = i % rows;
            round_block<Dot, Format::kRuns, Format::kZero>(row_of(m) + k * kBlock, *x.block(k, m), x.part(k, m));
        }
    });
    return x;
}

// `count` rows of x from m0 on times rows first … last-1 of W; `first` is a multiple of kSpan.
template <typename Format, typename Store>
void multiply_blocks(const BlockOperands<Format>& p, int64_t m0, int64_t count, int64_t first, int64_t last,
                     const Store& store) {
    for (int64_t m = 0; m < count; m += kMaxTokens)
        for (int64_t n = first; n < last; n += kSpan)
            multiply_span(p, m0 + m, static_cast<int>(min(kMaxTokens, count - m)), n, store);
}

// Rows of W in a chunk that a thread takes: of about 64 KiB, as for those that are no blocks.
inline int64_t block_rows_of_chunk(int64_t group_stride, int64_t out_features, int threads, int64_t bytes = 64 * 1024) {
    const int64_t span_bytes = divide_up(group_stride * kSpan, kGroup);
    return min(divide_up(bytes, span_bytes), divide_up(out_features, 2 * threads * kSpan)) * kSpan;
}

}  // namespace speculative_mamba::SM_ISA
