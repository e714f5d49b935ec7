// Products of linear_blocks.h by tiles, with the same bits. A row of A is a digit of a row of x, of a block's features;
// B is a block of sixteen rows of W; so C has the sums of the block for each digit.
//
// Tiles go from unit to unit through memory, and what one unit has just written another one could not read at once. So
// the sums of a block are stored when the products of the second block after it begin, and scaled in the block after
// that.
#pragma once

#include "block_operands.h"
#include "tiles.h"

namespace speculative_mamba::SM_ISA {

constexpr int kDigits = 3;
constexpr int kFewest = 2, kMost = kTileRows / kDigits;  // rows of x; one is sooner done by dot products
constexpr int kGroups = 2;                               // of rows of W, that share what is loaded of x
constexpr int kBlockRows = kBlock / 4;                   // of B
constexpr int kAhead = 3;                                // blocks that are laid out before their products
constexpr int kStoredAfter = 2, kScaledAfter = 3;        // blocks

struct TileBuffers {
    alignas(kTileBytes) uint8_t weights[kAhead + 1][kGroups][kBlockRows][kTileBytes];
    alignas(kTileBytes) int32_t sums[kStoredAfter][kGroups][kTileRows][kTileRows];
};

// A is tile 0, B tiles 1 and 2, C tiles 4 … 7: of each group, of blocks with an even and those with an odd number.
inline TileShapes block_shapes(int count) {
    const uint8_t digits = static_cast<uint8_t>(kDigits * count);
    TileShapes shapes;
    shapes.of[0] = {digits, kBlock};
    shapes.of[1] = shapes.of[2] = {kBlockRows, kTileBytes};
    for (int tile = 4; tile < kTiles; tile++) shapes.of[tile] = {digits, kTileBytes};
    return shapes;
}

// Lays out a block of weights as bytes with a sign.
template <typename Format>
inline void lay_out(const uint8_t* quants, uint8_t (*block)[kTileBytes]) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; i++)
        for (int row = 0; row < kGroup; row += kRows)
            store_bytes(block[i] + 4 * row, less(Format::weights(quants, i, row), Format::kZero));
}

// Adds products with the digits in tile 0 to C. Bytes that are weights as they lie are above their value.
template <typename Format, int C, int B>
inline void multiply_tiles() {
    if constexpr (Format::kBytes) tile_dpbsud<C, 0, B>();
    else tile_dpbssd<C, 0, B>();
}

// kCount rows of x from m0 on times kGroups groups of rows of W from n on.
template <int kCount, typename Format, typename Store>
void multiply_groups(const BlockOperands<Format>& p, TileBuffers& buffers, int64_t m0, int64_t n, const Store& store) {
    // A group that does not exist is the first one once more.
    const uint8_t* const groups[] = {p.group(n), p.group(n + kGroup < p.out_features ? n + kGroup : n)};
    const int64_t quants_at = p.quants_at(), blocks = p.in_features / kBlock;
    Floats totals[kGroups][kGroup / kRows][kCount];
    for (auto& of_group : totals)
        for (auto& of_rows : of_group)
            for (Floats& total : of_rows) total = floats(0);
    const auto quants_of = [&](int64_t b, int g) { return groups[g] + quants_at + b * Format::kQuantBytes; };
    const auto prepare = [&](int64_t b) __attribute__((always_inline)) {
        for (int g = 0; g < kGroups && b < blocks; g++) {
            prefetch_quants<Format>(quants_of(b, g));
            if constexpr (!Format::kBytes) lay_out<Format>(quants_of(b, g), buffers.weights[b % (kAhead + 1)][g]);
        }
    };
    const auto tile_of = [&](int64_t b, int g) {
        return Format::kBytes ? quants_of(b, g) : buffers.weights[b % (kAhead + 1)][g][0];
    };
    const auto add_scaled = [&](int64_t b, int g) __attribute__((always_inline)) {
        if (b < 0 || b >= blocks) return;
        const InputBlock* const x = p.x.block(b, m0);
        for (int i = 0; i < kGroup / kRows; i++) {
            const Format format(groups[g], b, i * kRows);
#pragma GCC unroll 5
            for (int m = 0; m < kCount; m++) {
                const auto digit = [&](int d) {
                    return load_ints(buffers.sums[b % kStoredAfter][g][kDigits * m + d] + i * kRows);
                };
                Ints high = shifted(digit(0), digit(1)), low = digit(2);
                if constexpr (Format::kBytes) {
                    high = add(high, ints(x[m].above[0].high));
                    low = add(low, ints(x[m].above[0].low));
                }
                const Floats sum = total(high, low);
                totals[g][i][m] = fma(format.scaled(sum, 0, x[m]), floats(x[m].scale), totals[g][i][m]);
            }
        }
    };
    const auto multiply = [&](int64_t b, auto odd) __attribute__((always_inline)) {
        constexpr int kFirst = 4 + 2 * decltype(odd)::value, kSecond = kFirst + 1;
        auto& sums = buffers.sums[odd];
        prepare(b + kAhead);
        if (b < blocks) {
            tile_loadd<0>(p.x.part(b, m0), kBlock);
            tile_loadd<1>(tile_of(b, 0), kTileBytes);
        }
        tile_stored<kFirst>(sums[0], kTileBytes);
        if (b < blocks) {
            tile_zero<kFirst>();
            multiply_tiles<Format, kFirst, 1>();
            tile_loadd<2>(tile_of(b, 1), kTileBytes);
        }
        add_scaled(b - kScaledAfter, 0);
        tile_stored<kSecond>(sums[1], kTileBytes);
        if (b < blocks) {
            tile_zero<kSecond>();
            multiply_tiles<Format, kSecond, 2>();
        }
        add_scaled(b - kScaledAfter, 1);
    };
    for (int64_t b = 0; b < kAhead; b++) prepare(b);
    for (int64_t b = 0; b < blocks + kScaledAfter; b += 2) {
        multiply(b, std::false_type());
        multiply(b + 1, std::true_type());
    }
    for (int m = 0; m < kCount; m++) {
        float row[kGroups * kGroup];
        for (int i = 0; i < kGroups * kGroup; i += kRows)
            store_rows(row + i, totals[i / kGroup][i % kGroup / kRows][m]);
        store(m0 + m, n, row, min(kGroups * kGroup, p.out_features - n));
    }
}

// The same for kCount or fewer rows of x, at least kFewest.
template <int kCount = kMost, typename Format, typename Store>
void multiply_few(const BlockOperands<Format>& p, TileBuffers& buffers, int64_t m0, int64_t count, int64_t n,
                  const Store& store) {
    if (count == kCount) return multiply_groups<kCount>(p, buffers, m0, n, store);
    if constexpr (kCount > kFewest) multiply_few<kCount - 1>(p, buffers, m0, count, n, store);
}

// As multiply_blocks; none of it in a format with two scales in a block, and false. Rows of x go through rows of W in
// passes of nearly even size, each but the first one with weights that are in a cache.
template <typename Format, typename Store>
bool multiply_blocks_tiles(const BlockOperands<Format>& p, int64_t m0, int64_t count, int64_t first, int64_t last,
                           const Store& store) {
    if constexpr (Format::kRuns == 1) {
        if (count < kFewest) return false;
        const int64_t passes = divide_up(count, kMost);
        const TileScope scope(block_shapes(static_cast<int>(divide_up(count, passes))));
        TileBuffers buffers;
        for (int64_t n = first; n < last; n += kGroups * kGroup)
            for (int64_t left = passes, m = 0, rows; left > 0; left--, m += rows) {
                rows = divide_up(count - m, left);
                multiply_few(p, buffers, m0 + m, rows, n, store);
            }
        return true;
    }
    return false;
}

}  // namespace speculative_mamba::SM_ISA
