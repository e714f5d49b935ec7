// Rows of x times rows of W, the same for every linear layer. Weights are read once, in the row-major order in which
// checkpoints store them. Lanes run over K: lane l of an output sums features l, l+16, l+32, … one after the other,
// then the lanes are added in a fixed tree. Neither how many rows of x share a pass, nor where blocks of features end,
// nor which thread runs it enters that order, so a product depends on its two rows alone. Rows of at most sixteen
// features have an order of their own, that of linear_short_rows.h.
#pragma once

#include "linear_short_rows.h"
#include "parallel_for.h"
#include "simd.h"

namespace speculative_mamba::SM_ISA {

// M rows of x × R rows of W are held in accumulators at a time: as many as the register file takes. x goes through in
// blocks of kBlockBytes: two loads of eight lanes wait for the first-level cache, one of sixteen seldom does. Weights
// are fetched prefetch_bytes ahead in every row.
#if defined(__AVX512F__)
constexpr int kMaxTokens = 6;
constexpr int weight_rows(int M) { return M == 1 ? 8 : 4; }
constexpr int64_t kBlockBytes = 1 << 20;
constexpr int64_t prefetch_bytes(int) { return 2048; }
#else
constexpr int kMaxTokens = 5;
constexpr int weight_rows(int M) { return M == 1 ? 4 : M <= 3 ? 2 : 1; }
constexpr int64_t kBlockBytes = 40 * 1024;
constexpr int64_t prefetch_bytes(int M) { return M == 1 ? 2048 : 4096; }
#endif
constexpr int kGroup = 8;  // rows of W that go through a block of features together
// Shorter rows of W are read as R long pieces of memory side by side instead of row by row: processors fetch ahead by
// themselves what is read in order, but see one order in a page of memory, which has several such rows.
constexpr int64_t kShortRowBytes = 2048;

// Adds `count` features of M rows of x times R rows of W, so far apart, to their sums. What will be read after these
// weights is fetched towards their end, so that nothing starts cold.
template <typename scalar_t, int M, int R>
inline void accumulate(const LinearOperands<scalar_t>& p, const float* x, const scalar_t* weight, int64_t row_stride,
                       const scalar_t* next, int64_t count, Vec (&totals)[R][M]) {
    Vec sums[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = totals[r][m];
    auto span = [&](int64_t k, int64_t last, int64_t ahead) {
        for (; k < last; k += kLanes) {
            Vec w[R];
            for (int r = 0; r < R; r++) {
                const scalar_t* source = weight + r * row_stride + k;
                w[r] = load(source);
                prefetch_to_l2(source + ahead);
            }
            for (int m = 0; m < M; m++) {
                Vec input = load(x + m * p.x_row_stride + k);
                for (int r = 0; r < R; r++) sums[r][m] = fma(w[r], input, sums[r][m]);
            }
        }
    };
    const int64_t ahead = min(prefetch_bytes(M) / sizeof(scalar_t), count);
    const int64_t turn = (count - ahead) / kLanes * kLanes;
    span(0, turn, ahead);
    span(turn, count, next - weight + ahead - count);
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) totals[r][m] = sums[r][m];
}

// M rows of x from m0 on times `tiles` tiles of R rows of W, a block of features at a time; then come those `after`.
// Row r of tile t is row n0 + t · tile_step + r · row_step.
template <typename scalar_t, int M, int R, typename Store>
inline void multiply_group(const LinearOperands<scalar_t>& p, int64_t m0, int64_t n0, int tiles, int64_t tile_step,
                           int64_t row_step, const scalar_t* after, const Store& store) {
    const int64_t full = p.in_features / kLanes * kLanes, rest = p.in_features - full;
    constexpr int64_t max_block = kBlockBytes / (M * static_cast<int64_t>(sizeof(float)));
    const int64_t blocks = divide_up(full, max_block);
    const int64_t block = blocks > 1 ? divide_up(full, blocks * kLanes) * kLanes : full;
    const float* x = p.x + m0 * p.x_row_stride;
    const scalar_t* weight = p.weight + n0 * p.weight_row_stride;
    const int64_t tile_stride = tile_step * p.weight_row_stride, row_stride = row_step * p.weight_row_stride;
    Vec sums[kGroup / R][R][M];
    for (int t = 0; t < tiles; t++)
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) sums[t][r][m] = zero();
    for (int64_t k = 0; k < full; k += block) {
        const int64_t count = min(block, full - k);
        for (int t = 0; t < tiles; t++) {
            const scalar_t* here = weight + t * tile_stride + k;
            const scalar_t* next = t + 1 < tiles ? here + tile_stride : k + block < full ? weight + k + block : after;
            accumulate<scalar_t, M, R>(p, x + k, here, row_stride, next, count, sums[t]);
        }
    }
    Vec input[M];
    for (int m = 0; m < M; m++) input[m] = rest ? load_partial(x + m * p.x_row_stride + full, rest) : zero();
    for (int t = 0; t < tiles && rest; t++)
        for (int r = 0; r < R; r++) {
            const int64_t n = t * tile_step + r * row_step;
            Vec w = load_partial(weight + n * p.weight_row_stride + full, rest);
            for (int m = 0; m < M; m++) sums[t][r][m] = fma(w, input[m], sums[t][r][m]);
        }
    if (tiles < kGroup / R) {
        for (int t = 0; t < tiles; t++)
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++) store(m0 + m, n0 + t * tile_step + r * row_step, sum(sums[t][r][m]));
        return;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m += 2) {  // the sums of two rows of x
        const int last = m + 1 < M ? m + 1 : m;
        Vec lanes[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kGroup; i++) {
            lanes[i] = sums[i / R][i % R][m];
            lanes[kGroup + i] = sums[i / R][i % R][last];
        }
        float totals[kLanes];
        speculative_mamba::SM_ISA::store(totals, add_lanes(lanes));
#pragma GCC unroll 8
        for (int i = 0; i < kGroup; i++) {
            const int64_t n = n0 + i / R * tile_step + i % R * row_step;
            store(m0 + m, n, totals[i]);
            if (last > m) store(m0 + last, n, totals[kGroup + i]);
        }
    }
}

template <typename scalar_t, int M, typename Store>
inline void multiply_tokens(const LinearOperands<scalar_t>& p, int64_t m, int64_t n, int64_t last, const Store& store) {
    constexpr int R = weight_rows(M), kTiles = kGroup / R;
    const auto row = [&p](int64_t n) { return p.weight + n * p.weight_row_stride; };
    const auto after = [&](int64_t end) { return end < last || !p.after ? row(end) : p.after; };
    if (p.in_features * static_cast<int64_t>(sizeof(scalar_t)) < kShortRowBytes) {
        const int64_t tiles = (last - n) / kGroup * kTiles;  // and so many rows has each of the R pieces
        for (int64_t t = 0; t < tiles; t += kTiles)
            multiply_group<scalar_t, M, R>(p, m, n + t, kTiles, 1, tiles,
                                           t + kTiles < tiles ? row(n + t + kTiles) : after(n + R * tiles), store);
        n += R * tiles;
    }
    for (; n + kGroup <= last; n += kGroup)
        multiply_group<scalar_t, M, R>(p, m, n, kTiles, R, 1, after(n + kGroup), store);
    if (n < last) multiply_group<scalar_t, M, 1>(p, m, n, static_cast<int>(last - n), 1, 1, after(last), store);
}

// All rows of x times rows first … last-1 of W: calls store(m, n, sum) for each product.
template <typename scalar_t, typename Store>
inline void multiply_rows(const LinearOperands<scalar_t>& p, int64_t rows, int64_t first, int64_t last,
                          const Store& store) {
    if (p.in_features <= kLanes) {
        return multiply_short_rows(p, rows, first, last, [&store](int64_t m, int64_t n, Vec sums, int64_t count) {
            float totals[kLanes];
            speculative_mamba::SM_ISA::store(totals, sums);
            for (int64_t i = 0; i < count; i++) store(m, n + i, totals[i]);
        });
    }
    int64_t m = 0;
    for (; m + kMaxTokens <= rows; m += kMaxTokens) multiply_tokens<scalar_t, kMaxTokens>(p, m, first, last, store);
    switch (rows - m) {
        case 1: return multiply_tokens<scalar_t, 1>(p, m, first, last, store);
        case 2: return multiply_tokens<scalar_t, 2>(p, m, first, last, store);
        case 3: return multiply_tokens<scalar_t, 3>(p, m, first, last, store);
        case 4: return multiply_tokens<scalar_t, 4>(p, m, first, last, store);
        case 5:
            if constexpr (kMaxTokens > 5) return multiply_tokens<scalar_t, 5>(p, m, first, last, store);
    }
}

// Rows of W in a chunk that a thread takes: of about 64 KiB, long enough to hide their hand-out, short enough to end
// together, and for many rows of x small enough to be found in the cache again by the next tile.
template <typename scalar_t>
inline int64_t rows_of_chunk(int64_t in_features, int64_t out_features, int threads, int64_t bytes = 64 * 1024) {
    const int64_t row_bytes = in_features * static_cast<int64_t>(sizeof(scalar_t));
    const int64_t rows = divide_up(bytes, row_bytes > 0 ? row_bytes : 1);
    return divide_up(min(rows, divide_up(out_features, 2 * threads)), kGroup) * kGroup;
}

}  // namespace speculative_mamba::SM_ISA
