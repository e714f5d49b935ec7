// Products of linear_blocks.h by tiles, with the same bits. A row of A is a digit of a row of x, of 64 features: two
// blocks. B is one block of sixteen rows of W, with zeros where the other's features are. So C has the sums of a block
// for each digit. Scales are applied to the sums of the block before while products are on their way: what one unit has
// just written, another one could not read at once.
#pragma once

#include "block_operands.h"
#include "tiles.h"

namespace speculative_mamba::SM_ISA {

constexpr int kDigits = 3;
constexpr int kMinTokens = 3;  // with fewer, dot products are sooner done
constexpr int kGroups = 2;     // that share what is loaded of x
constexpr int kAhead = 3;      // blocks that are laid out before their products, to be in the cache by then

struct TileBuffers {
    static constexpr int kBlockRows = kTileRows / 2;  // of B

    // Blocks of weights with as many rows of zeros on either side.
    alignas(kTileBytes) uint8_t weights[kGroups][kBlockRows + (kAhead + 1) * kTileRows][kTileBytes];
    alignas(kTileBytes) int32_t sums[2][kGroups][kMaxTokens * kDigits][kTileRows];
    alignas(kTileBytes) float totals[kMaxTokens][kGroups][kGroup];

    uint8_t* block(int group, int64_t b) { return weights[group][kBlockRows + b % (kAhead + 1) * kTileRows]; }
    // Sixteen rows of B: of an even block the first ones.
    const uint8_t* tile(int group, int64_t b) { return block(group, b) - b % 2 * kBlockRows * kTileBytes; }
};

// Lays out a block of weights as bytes with a sign.
template <typename Format>
inline void lay_out(const uint8_t* quants, uint8_t* block) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlock / 4; i++)
        for (int row = 0; row < kGroup; row += kRows)
            store_bytes(block + i * kTileBytes + 4 * row, less(Format::weights(quants, i, row), Format::kZero));
}

// `count` rows of x from m0 on, whose digits fill Height tiles, times kGroups groups of rows of W from n on.
template <typename Format, int Height, typename Store>
void multiply_groups(const BlockOperands<Format>& p, TileBuffers& buffers, int64_t m0, int count, int64_t n,
                     const Store& store) {
    // A group that does not exist is the first one once more.
    const uint8_t* const groups[] = {p.group(n), p.group(n + kGroup < p.out_features ? n + kGroup : n)};
    const int64_t quants_at = p.quants_at(), blocks = p.in_features / kBlock;
    std::memset(buffers.totals, 0, count * sizeof buffers.totals[0]);
    const auto lay_out_block = [&](int64_t b) {
        for (int g = 0; g < kGroups && b < blocks; g++) {
            const uint8_t* const quants = groups[g] + quants_at + b * Format::kQuantBytes;
            prefetch_quants<Format>(quants);
            lay_out<Format>(quants, buffers.block(g, b));
        }
    };
    const auto add_scaled = [&](int64_t b, int g, int first, int last) {
        if (b < 0) return;  // before the first block there is nothing, not even to read
        const InputBlock* const x = p.x.block(b, m0);
        for (int row = 0; row < kGroup; row += kRows) {
            const Format format(groups[g], b, row);
            for (int m = first; m < last; m++) {
                const int32_t* const digits = buffers.sums[b % 2][g][kDigits * m] + row;
                const Ints high = shifted(load_ints(digits), load_ints(digits + kTileRows));
                const Floats sum = total(high, load_ints(digits + 2 * kTileRows));
                float* const at = buffers.totals[m][g] + row;
                store_rows(at, fma(format.scaled(sum, 0, x[m]), floats(x[m].scale), load_rows(at)));
            }
        }
    };
    for (int64_t b = 0; b < kAhead; b++) lay_out_block(b);
    int32_t* pending = buffers.sums[1][0][0];  // where the sums in tile 4 go
    for (int64_t b = 0; b < blocks; b++) {
        lay_out_block(b + kAhead);
        const int8_t* const digits = p.x.part(b / 2 * 2, m0);
        auto* const sums = buffers.sums[b % 2];
        tile_loadd<1>(buffers.tile(0, b), kTileBytes);
        tile_loadd<2>(buffers.tile(1, b), kTileBytes);
        for (int h = 0; h < Height; h++) {
            const int first = count * h / Height, last = count * (h + 1) / Height;
            tile_loadd<0>(digits + h * kTileRows * kPartStride, kPartStride);
            tile_zero<3>();
            tile_dpbssd<3, 0, 1>();
            tile_stored<4>(pending, kTileBytes);
            add_scaled(b - 1, 0, first, last);
            tile_zero<4>();
            tile_dpbssd<4, 0, 2>();
            tile_stored<3>(sums[0][h * kTileRows], kTileBytes);
            add_scaled(b - 1, 1, first, last);
            pending = sums[1][h * kTileRows];
        }
    }
    tile_stored<4>(pending, kTileBytes);
    for (int g = 0; g < kGroups && blocks > 0; g++) add_scaled(blocks - 1, g, 0, count);
    for (int m = 0; m < count; m++) store(m0 + m, n, buffers.totals[m][0], min(kGroups * kGroup, p.out_features - n));
}

// As multiply_blocks, but leaves a rest of few rows of x. Returns how many rows it took: none in a format with two
// scales in a block, for which every half of it would need a tile of its own.
template <typename Format, typename Store>
int64_t multiply_blocks_tiles(const BlockOperands<Format>& p, int64_t m0, int64_t count, int64_t first, int64_t last,
                              const Store& store) {
    int64_t m = 0;
    if constexpr (Format::kRuns == 1) {
        if (count < kMinTokens) return 0;
        const TileScope scope;
        TileBuffers buffers;
        std::memset(buffers.weights, 0, sizeof buffers.weights);
        while (count - m >= kMinTokens) {
            const int rows = static_cast<int>(min(kMaxTokens, count - m));
            const int64_t height = divide_up(kDigits * rows, kTileRows);
            for (int64_t n = first; n < last; n += kGroups * kGroup) {
                if (height == 1) multiply_groups<Format, 1>(p, buffers, m0 + m, rows, n, store);
                if (height == 2) multiply_groups<Format, 2>(p, buffers, m0 + m, rows, n, store);
                if (height == 3) multiply_groups<Format, 3>(p, buffers, m0 + m, rows, n, store);
            }
            m += rows;
        }
    }
    return m;
}

}  // namespace speculative_mamba::SM_ISA
