// Rows of x times rows of W in blocks. Lanes are rows of W: a block's products are summed as integers, exactly, and its
// scale costs a multiply-add for all rows.
//
// An output: blocks one after the other. Nothing else enters that order, and every instruction set with a fused
// multiply-add gives the same bits.
#pragma once

#include "block_operands.h"
#include "buffer.h"
#if defined(SM_TILES)
#include "linear_blocks_tiles.h"
#endif

namespace speculative_mamba::SM_ISA {

// A pass goes through kSpan rows of W. Two registers of them at a time are multiplied with one row of x after the
// other: what is loaded of x serves both.
constexpr int kRegisters = 2, kSpan = kRegisters * kRows > kGroup ? kRegisters * kRows : kGroup;
constexpr int kBlocksAhead = 16;  // are fetched before they are read

// Adds a run's products with a row of x to its totals.
template <typename Format, typename Weights, typename part_t>
inline void add_products(const Weights (&w)[kRegisters][8 / Format::kRuns], const Format (&formats)[kRegisters],
                         int run, const InputBlock& block, const part_t* parts, float* totals) {
    using Dot = DotOf<Format::kLargest>;
    constexpr int kVectors = 8 / Format::kRuns;
    const auto above = block.above[run];
    typename Dot::Sum sums[Dot::kParts][kRegisters];
    for (int t = 0; t < kRegisters; t++) {
        sums[0][t] = Dot::start(0);
        sums[Dot::kParts - 2][t] = Dot::start(above.high);
        sums[Dot::kParts - 1][t] = Dot::start(above.low);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++)
#pragma GCC unroll 3
        for (int part = 0; part < Dot::kParts; part++) {
            const auto four = Dot::load_four(parts + part * kBlock + 4 * (run * kVectors + i));
            for (int t = 0; t < kRegisters; t++) sums[part][t] = Dot::add(sums[part][t], w[t][i], four);
        }
    for (int t = 0; t < kRegisters; t++) {
        Ints high = Dot::finished(sums[Dot::kParts - 2][t], above.high);
        if constexpr (Dot::kParts == 3) high = shifted(Dot::finished(sums[0][t], 0), high);
        const Ints low = Dot::finished(sums[Dot::kParts - 1][t], above.low);
        const Floats sum = formats[t].scaled(total(high, low), run, block);
        store_rows(totals + t * kRows, fma(sum, floats(block.scale), load_rows(totals + t * kRows)));
    }
}

// `count` rows of x from m0 on times kSpan rows of W from n on: calls store(m, n, sums,
// number of sums) for each row of x.
template <typename Format, typename Store>
void multiply_span(const BlockOperands<Format>& p, int64_t m0, int count, int64_t n, const Store& store) {
    using Dot = DotOf<Format::kLargest>;
    using Inputs = BlockInputs<Dot>;
    constexpr int kVectors = 8 / Format::kRuns, kGroups = kSpan / kGroup;
    const int64_t last = (divide_up(p.out_features, kGroup) - 1) * kGroup, quants_at = p.quants_at();
    const uint8_t* groups[kGroups];
    // A group that does not exist is the last one once more.
    for (int g = 0; g < kGroups; g++) groups[g] = p.group(min(n + g * kGroup, last));
    alignas(64) float totals[kMaxTokens * kSpan];
    for (int i = 0; i < count * kSpan; i++) totals[i] = 0;
    // Fetched are the quants at a distance, behind the last block those of the next span, and that one's scales.
    const int64_t blocks = p.in_features / kBlock, to_next_span = kGroups * p.group_stride;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t quants = quants_at + b * Format::kQuantBytes;
        const int64_t far = b + kBlocksAhead < blocks ? 0 : to_next_span - blocks * Format::kQuantBytes;
        for (int g = 0; g < kGroups; g++) {
            for (int i = 0; i < Format::kQuantBytes; i += kLine)
                prefetch_to_l2(groups[g] + quants + kBlocksAhead * Format::kQuantBytes + far + i);
            prefetch_to_l2(groups[g] + to_next_span + b * kBlock / Format::kFeatures * Format::kScaleBytes);
        }
        const InputBlock* const inputs = p.x.block(b, m0);
        const typename Dot::part_t* const parts = p.x.part(b, m0);
        for (int row = 0; row < kSpan; row += kRegisters * kRows) {
            const auto group = [&](int t) { return groups[(row + t * kRows) / kGroup]; };
            const auto in_group = [&](int t) { return (row + t * kRows) % kGroup; };
            Format formats[kRegisters];
            for (int t = 0; t < kRegisters; t++) formats[t] = Format(group(t), b, in_group(t));
            for (int run = 0; run < Format::kRuns; run++) {
                typename Dot::Weights w[kRegisters][kVectors];
                for (int t = 0; t < kRegisters; t++)
#pragma GCC unroll 8
                    for (int i = 0; i < kVectors; i++)
                        w[t][i] = Dot::prepared(Format::weights(group(t) + quants, run * kVectors + i, in_group(t)));
                for (int m = 0; m < count; m++)
                    add_products(w, formats, run, inputs[m], parts + m * Inputs::kRowStride, totals + m * kSpan + row);
            }
        }
    }
    for (int m = 0; m < count; m++) store(m0 + m, n, totals + m * kSpan, min(kSpan, p.out_features - n));
}

// Rounds rows of x, of which row_of(m) tells where it begins, with so many threads in memory of the calling one, which
// has them already if `threads` is 0.
template <typename Format, typename RowOf>
BlockInputs<DotOf<Format::kLargest>> rounded_rows(int64_t rows, int64_t in_features, int threads, const RowOf& row_of) {
    using Dot = DotOf<Format::kLargest>;
    using Inputs = BlockInputs<Dot>;
    thread_local Buffer blocks, parts;
    const int64_t count = in_features / kBlock, inputs = rows * count, work_of_one = 16 * kBlock;
    const Inputs x{blocks.reserve<InputBlock>(inputs),
                   parts.reserve<typename Dot::part_t>((inputs + kSlack) * Inputs::kRowStride), rows};
    if (threads == 0 || inputs == 0) return x;
    parallel_for(inputs, divide_up(inputs, threads), inputs * work_of_one, threads, [&](int64_t first, int64_t last) {
        for (int64_t k = first / rows, m = first % rows; first < last; first++) {
            round_block<Dot, Format::kRuns, Format::kZero>(row_of(m) + k * kBlock, *x.block(k, m), x.part(k, m));
            if (++m == rows) m = 0, k++;
        }
    });
    return x;
}

// `count` rows of x from m0 on times rows first … last-1 of W; `first` is a multiple of kSpan.
template <typename Format, typename Store>
void multiply_blocks(const BlockOperands<Format>& p, int64_t m0, int64_t count, int64_t first, int64_t last,
                     const Store& store) {
#if defined(SM_TILES)
    if (multiply_blocks_tiles(p, m0, count, first, last, store)) return;
#endif
    for (int64_t m = 0; m < count; m += kMaxTokens)
        for (int64_t n = first; n < last; n += kSpan)
            multiply_span(p, m0 + m, static_cast<int>(min(kMaxTokens, count - m)), n, store);
}

// Rows of W in a chunk that a thread takes: of about 64 KiB, as for those that are no blocks.
inline int64_t block_rows_of_chunk(int64_t group_stride, int64_t out_features, int threads, int64_t bytes = 64 * 1024) {
    const int64_t span_bytes = divide_up(group_stride * kSpan, kGroup);
    return min(divide_up(bytes, span_bytes), divide_up(out_features, 2 * threads * kSpan)) * kSpan;
}

template <typename Format>
struct FormatTag {
    using type = Format;
};

// Calls call(FormatTag<Format>()) for the format of a weight in blocks.
template <typename Call>
void with_format(DType dtype, const Call& call) {
    switch (dtype) {
        case DType::q8_0: return call(FormatTag<Q8_0>());
        case DType::q4_0: return call(FormatTag<Q4_0>());
        case DType::q4_k: return call(FormatTag<Q4_K>());
        case DType::q6_k: return call(FormatTag<Q6_K>());
        default: throw_unknown_dtype(dtype);
    }
}

}  // namespace speculative_mamba::SM_ISA
