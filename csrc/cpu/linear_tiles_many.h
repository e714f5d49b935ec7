// The products of linear_tiles.h for many rows of x. Here these are rows of the left tile, and rows of W become columns
// of the right one, once for all rows of x, so that sums come out as rows of y. The operations on a product are the
// same in the same order: a tile's product does not tell left from right.
#pragma once

#include "linear_tiles.h"

namespace speculative_mamba::SM_ISA {

// All rows of x in groups of sixteen. A group has for every kTileFeatures of them one tile for each part.
class TokenRows {
 public:
    TokenRows(const LinearOperands<bf16_t>& p, int64_t rows, int threads)
        : rows_(rows), steps_(divide_up(p.in_features, kTileFeatures)) {
        thread_local Buffer tiles, least;
        tiles_ = tiles.reserve<bf16_t>(groups() * group_size());
        least_ = least.reserve<float>(groups() * kTileRows);
        parallel_for(groups(), 1, groups() * group_size(), threads, [&](int64_t first, int64_t last) {
            for (int64_t group = first; group < last; group++) pack(p, group);
        });
    }
    int64_t groups() const { return divide_up(rows_, kTileRows); }
    int64_t group_size() const { return steps_ * kStep; }
    const bf16_t* tiles(int64_t group) const { return tiles_ + group * group_size(); }
    const float* least(int64_t group) const { return least_ + group * kTileRows; }
    int rows(int64_t group) const { return static_cast<int>(min(kTileRows, rows_ - group * kTileRows)); }

    static constexpr int64_t kStep = kTokenParts * kTileRows * kTileFeatures;

 private:
    // Some features of each row at a time, whose tiles stay in the first-level cache.
    void pack(const LinearOperands<bf16_t>& p, int64_t group) const {
        constexpr int64_t kSteps = 8;
        bf16_t* const tiles = tiles_ + group * group_size();
        const float* const x = p.x + group * kTileRows * p.x_row_stride;
        for (int64_t first = 0; first < steps_; first += kSteps)
            for (int m = 0; m < kTileRows; m++) {
                bf16_t* row = tiles + first * kStep + m * kTileFeatures;
                for (int64_t step = first; step < min(first + kSteps, steps_); step++, row += kStep)
                    if (m < rows(group))
                        split_features(x + m * p.x_row_stride, step * kTileFeatures, p.in_features, row,
                                       kTileRows * kTileFeatures);
                    else
                        for (int d = 0; d < kTokenParts; d++)
                            std::memset(row + d * kTileRows * kTileFeatures, 0, kTileBytes);
            }
        for (int m = 0; m < rows(group); m++)
            least_[group * kTileRows + m] = least_product(x + m * p.x_row_stride, p.in_features);
    }

    int64_t rows_, steps_;
    bf16_t* tiles_;
    float* least_;
};

// Rows of W from `first` to `last` as right tiles: for each panel, for every kTileFeatures of them, kPanelTiles tiles.
inline void pack_weights(const LinearOperands<bf16_t>& p, int64_t first, int64_t last, bf16_t* tiles) {
    for (int64_t n = first; n < last; n += kPanelRows) {
        const WeightRows panel{p.weight + n * p.weight_row_stride, p.weight_row_stride, p.in_features, last - n};
        for (int64_t k = 0; k < p.in_features; k += kTileFeatures)
            for (int64_t row = 0; row < kPanelRows; row += kTileRows, tiles += 2 * kTileFloats) {
                auto* const out = reinterpret_cast<float*>(tiles);
                if (panel.has(row, k)) {
                    transpose(panel.weight + row * panel.row_stride + k, panel.row_stride * sizeof(bf16_t), out);
                    continue;
                }
                alignas(kTileBytes) bf16_t tile[kTileRows][kTileFeatures];
                panel.copy(row, k, tile);
                transpose(tile, kTileBytes, out);
            }
    }
}

// The sums of a group of rows of x times a panel: for each sixteen rows of W a tile for each part.
inline void multiply_many_tiles(const bf16_t* x, const bf16_t* weights, int64_t steps, float* sums) {
    constexpr int64_t kTile = kTileRows * kTileFeatures;
    constexpr int kW = kPanelTiles * kTokenParts, kX = kW + 1;
    static_assert(kX < kTiles && kPanelTiles == 2 && kTokenParts == 3);
    unrolled<kW>([](auto i) { tile_zero<i.value>(); });
    for (int64_t step = 0; step < steps; step++, x += TokenRows::kStep, weights += kPanelTiles * kTile) {
        tile_loadd<kW>(weights, kTileBytes);
        tile_loadd<kX>(x, kTileBytes);
        tile_dpbf16ps<0, kX, kW>();
        tile_loadd<kX>(x + kTile, kTileBytes);
        tile_dpbf16ps<1, kX, kW>();
        tile_loadd<kX>(x + 2 * kTile, kTileBytes);
        tile_dpbf16ps<2, kX, kW>();
        tile_loadd<kW>(weights + kTile, kTileBytes);
        tile_dpbf16ps<5, kX, kW>();
        tile_loadd<kX>(x + kTile, kTileBytes);
        tile_dpbf16ps<4, kX, kW>();
        tile_loadd<kX>(x, kTileBytes);
        tile_dpbf16ps<3, kX, kW>();
    }
    unrolled<kW>([sums](auto i) { tile_stored<i.value>(sums + i.value * kTileFloats, kTileBytes); });
}

// Bytes of packed weights that stay in the second-level cache while all rows of x pass.
constexpr int64_t kResidentBytes = 1 << 20;

inline int64_t resident_rows(const LinearOperands<bf16_t>& p) {
    const int64_t row_bytes = divide_up(p.in_features, kTileFeatures) * kTileBytes;
    return (kResidentBytes / (row_bytes * kPanelRows + 1) + 1) * kPanelRows;
}

// Groups first_group … last_group-1 of x times rows first … last-1 of W: calls store(m, n, sums, count) for `count` of
// W's rows from n on. While a block of weights is in use, the next is on its way, and so is the next group.
template <typename Store>
inline void multiply_many_rows(const LinearOperands<bf16_t>& p, const TokenRows& x, int64_t first_group,
                               int64_t last_group, int64_t first, int64_t last, const Store& store) {
    thread_local Buffer buffer;
    const int64_t steps = divide_up(p.in_features, kTileFeatures), block = resident_rows(p);
    const int64_t panel_size = steps * kPanelTiles * 2 * kTileFloats;
    bf16_t* const tiles = buffer.reserve<bf16_t>(divide_up(min(block, last - first), kPanelRows) * panel_size);
    alignas(kTileBytes) float sums[kPanelTiles * kTokenParts * kTileFloats];
    for (int64_t begin = first; begin < last; begin += block) {
        const int64_t end = min(begin + block, last), panels = divide_up(end - begin, kPanelRows);
        pack_weights(p, begin, end, tiles);
        const int64_t lines = min(block, last - end) * steps;
        const int64_t share = divide_up(lines, panels * (last_group - first_group));
        const int64_t token_lines = x.group_size() * sizeof(bf16_t) / kTileBytes;
        const int64_t token_share = divide_up(token_lines, panels);
        int64_t line = 0;
        for (int64_t group = first_group; group < last_group; group++) {
            const float* const least = x.least(group);
            const int rows = x.rows(group);
            for (int64_t panel = 0; panel < panels; panel++) {
                for (const int64_t until = min(lines, line + share); line < until; line++)
                    __builtin_prefetch(
                        p.weight + (end + line / steps) * p.weight_row_stride + line % steps * kTileFeatures, 0, 2);
                if (group + 1 < last_group)
                    for (int64_t i = panel * token_share; i < min(token_lines, (panel + 1) * token_share); i++)
                        __builtin_prefetch(x.tiles(group + 1) + i * kTileFeatures, 0, 2);
                multiply_many_tiles(x.tiles(group), tiles + panel * panel_size, steps, sums);
                int64_t n = begin + panel * kPanelRows;
                for (int r = 0; r < kPanelTiles && n < end; r++, n += kTileRows) {
                    const int count = static_cast<int>(min(kTileRows, end - n));
                    const float* first_part = sums + r * kTokenParts * kTileFloats;
                    for (int i = 0; i < rows; i++, first_part += kTileRows) {
                        const float *second = first_part + kTileFloats, *third = second + kTileFloats;
                        const Vec total = add(add(load(third), load(second)), load(first_part));
                        store(group * kTileRows + i, n, accurate(p, group * kTileRows + i, n, count, least[i], total),
                              count);
                    }
                }
            }
        }
    }
}

}  // namespace speculative_mamba::SM_ISA
