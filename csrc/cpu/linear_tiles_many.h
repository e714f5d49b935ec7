// The products of linear_tiles.h for many rows of x. Here these are rows of the left tile, and rows of W become columns
// of the right one, once for all rows of x, so that sums come out as rows of y. The operations on a product are the
// same in the same order: a tile's product does not tell left from right.
#pragma once

#include "linear_tiles.h"

namespace speculative_mamba::SM_ISA {

// Values of a step of kTileFeatures features of sixteen rows of x: one tile for each part.
constexpr int64_t kTokenStep = kTokenParts * kTileRows * kTileFeatures;

// Up to sixteen rows of x.
struct TokenTiles {
    const bf16_t* tiles;  // for every step kTokenStep values
    const float* least;   // products of a row that are smaller in magnitude are computed again
    int rows;
};

inline int64_t token_tiles_size(int64_t features) { return divide_up(features, kTileFeatures) * kTokenStep; }

// A group of sixteen rows, or those that there are; the others are zero. Some features of each row at a time, whose
// tiles stay in the first-level cache, while the next ones are fetched.
inline TokenTiles pack_group(const LinearOperands<bf16_t>& p, int64_t tokens, int64_t group, bf16_t* tiles,
                             float* least) {
    constexpr int64_t kPiece = 8 * kTileFeatures;
    const int rows = static_cast<int>(min(kTileRows, tokens - group * kTileRows));
    const float* const x = p.x + group * kTileRows * p.x_row_stride;
    for (int64_t first = 0; first < p.in_features; first += kPiece)
        for (int row = 0; row < kTileRows; row++) {
            const float* const values = x + row * p.x_row_stride;
            bf16_t* parts = tiles + first / kTileFeatures * kTokenStep + row * kTileFeatures;
            for (int64_t k = first; k < min(first + kPiece, p.in_features); k += kTileFeatures, parts += kTokenStep) {
                for (int d = 0; d < kTokenParts && row >= rows; d++)
                    std::memset(parts + d * kTileRows * kTileFeatures, 0, kTileBytes);
                if (row >= rows) continue;
                for (int i = 0; i < kTileFeatures; i += kLanes) prefetch(values + k + kPiece + i);
                split_features(values, k, p.in_features, parts, kTileRows * kTileFeatures);
            }
        }
    for (int row = 0; row < rows; row++) least[row] = least_product(x + row * p.x_row_stride, p.in_features);
    return {tiles, least, rows};
}

// All groups, packed by so many threads in memory of the calling one: where they are used more than once.
class PackedGroups {
 public:
    PackedGroups(const LinearOperands<bf16_t>& p, int64_t tokens, int threads)
        : tokens_(tokens), size_(token_tiles_size(p.in_features)) {
        thread_local Buffer tiles, least;
        const int64_t groups = divide_up(tokens, kTileRows);
        tiles_ = tiles.reserve<bf16_t>(groups * size_);
        least_ = least.reserve<float>(groups * kTileRows);
        parallel_for(groups, 1, groups * size_, threads, [&](int64_t first, int64_t last) {
            for (int64_t g = first; g < last; g++) pack_group(p, tokens, g, tiles_ + g * size_, least_ + g * kTileRows);
        });
    }
    TokenTiles operator()(int64_t group) const {
        const int rows = static_cast<int>(min(kTileRows, tokens_ - group * kTileRows));
        return {tiles_ + group * size_, least_ + group * kTileRows, rows};
    }

 private:
    int64_t tokens_, size_;
    bf16_t* tiles_;
    float* least_;
};

// Rows of W from `first` to `last` as right tiles: for each panel, for every kTileFeatures of them, kPanelTiles tiles.
// Rows are fetched ahead, because hardware sees no order in pieces of so many.
constexpr int64_t kFeaturesAhead = 4 * kTileFeatures;
inline void pack_weights(const LinearOperands<bf16_t>& p, int64_t first, int64_t last, bf16_t* tiles) {
    for (int64_t n = first; n < last; n += kPanelRows) {
        const WeightRows panel{p.weight + n * p.weight_row_stride, p.weight_row_stride, p.in_features, last - n};
        for (int64_t k = 0; k < p.in_features; k += kTileFeatures) {
            const int64_t next = k + kFeaturesAhead < p.in_features
                                     ? k + kFeaturesAhead
                                     : k + kFeaturesAhead - p.in_features + kPanelRows * panel.row_stride;
            for (int64_t row = 0; row < kPanelRows; row += kTileRows, tiles += 2 * kTileFloats) {
                for (int64_t r = row; r < row + kTileRows; r++) prefetch(panel.weight + r * panel.row_stride + next);
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
}

// A tile that is stored more than a few hundred products after the last one waits for 300 ns on Sapphire Rapids,
// whatever was multiplied meanwhile. So something is stored every so many steps, of which there is no trace.
constexpr int64_t kStepsToStore = 8;

// The sums of a group of rows of x times a panel: for each sixteen rows of W a tile for each part.
inline void multiply_many_tiles(const bf16_t* x, const bf16_t* weights, int64_t steps, float* sums) {
    constexpr int64_t kTile = kTileRows * kTileFeatures;
    constexpr int kW = kPanelTiles * kTokenParts, kX = kW + 1;
    static_assert(kX < kTiles && kPanelTiles == 2 && kTokenParts == 3);
    unrolled<kW>([](auto i) { tile_zero<i.value>(); });
    for (int64_t step = 0; step < steps; step++, x += kTokenStep, weights += kPanelTiles * kTile) {
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
        if (step % kStepsToStore == 0) tile_stored<kX>(sums, kTileBytes);
    }
    unrolled<kW>([sums](auto i) { tile_stored<i.value>(sums + i.value * kTileFloats, kTileBytes); });
}

// Bytes of packed weights that stay in the second-level cache while all rows of x pass. What does not stay there comes
// five times slower, so there is room for two groups of x and for what hardware fetches ahead.
constexpr int64_t kResidentBytes = 768 << 10;

inline int64_t resident_rows(const LinearOperands<bf16_t>& p) {
    const int64_t row_bytes = divide_up(p.in_features, kTileFeatures) * kTileBytes;
    return (kResidentBytes / (row_bytes * kPanelRows + 1) + 1) * kPanelRows;
}

// Groups first_group … last_group-1 of x, each as tokens(group) packs it, times rows first … last-1 of W: calls
// store(m, n, sums, count) for `count` of W's rows from n on.
template <typename Tokens, typename Store>
inline void multiply_many_rows(const LinearOperands<bf16_t>& p, const Tokens& tokens, int64_t first_group,
                               int64_t last_group, int64_t first, int64_t last, const Store& store) {
    thread_local Buffer buffer;
    const int64_t steps = divide_up(p.in_features, kTileFeatures), block = resident_rows(p);
    const int64_t panel_size = steps * kPanelTiles * 2 * kTileFloats;
    bf16_t* const weights = buffer.reserve<bf16_t>(divide_up(min(block, last - first), kPanelRows) * panel_size);
    alignas(kTileBytes) float sums[kPanelTiles * kTokenParts * kTileFloats];
    for (int64_t begin = first; begin < last; begin += block) {
        const int64_t end = min(begin + block, last);
        pack_weights(p, begin, end, weights);
        for (int64_t group = first_group; group < last_group; group++) {
            const TokenTiles x = tokens(group);
            const bf16_t* panel = weights;
            for (int64_t n = begin; n < end; panel += panel_size) {
                multiply_many_tiles(x.tiles, panel, steps, sums);
                for (int r = 0; r < kPanelTiles && n < end; r++, n += kTileRows) {
                    const int count = static_cast<int>(min(kTileRows, end - n));
                    const float* first_part = sums + r * kTokenParts * kTileFloats;
                    for (int i = 0; i < x.rows; i++, first_part += kTileRows) {
                        const int64_t m = group * kTileRows + i;
                        const float *second = first_part + kTileFloats, *third = second + kTileFloats;
                        const Vec total = add(add(load(third), load(second)), load(first_part));
                        store(m, n, accurate(p, m, n, count, x.least[i], total), count);
                    }
                }
            }
        }
    }
}

}  // namespace speculative_mamba::SM_ISA
