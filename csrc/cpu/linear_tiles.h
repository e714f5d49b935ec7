// Rows of x times rows of W in bfloat16, by tiles. Sixteen rows of W are a tile as they lie in memory. A row of x is
// the sum of three rows in bfloat16, exactly; these are columns of the other tile, so that five rows of x fit one.
//
// A sum: tile_dpbf16ps over 32 features after the other, for each of the three parts; then (third + second) + first.
// Nothing else enters that order, so a product depends on its two rows alone.
//
// Tiles take subnormal numbers for zeros, and infinity times a part that is zero is NaN. So products that are not
// finite, or so small that this could show, are computed again by linear_rows.h. Whether they are depends on the two
// rows alone as well.
#pragma once

#include "buffer.h"
#include "linear_rows.h"
#include "tiles.h"

namespace speculative_mamba::SM_ISA {

constexpr int kTokenParts = 3, kTileFeatures = 32, kTileFloats = 256;
constexpr int kGroupTokens = 16;  // rows of x whose parts are columns of kTokenParts tiles at most

inline int64_t column_tiles(int64_t tokens) { return divide_up(tokens * kTokenParts, kTileRows); }

// out[j][i] = in[i][j], of 32 bits.
inline void transpose(const float* in, float* out) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(in + 16 * i);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // a[i + j]: four times column j of rows i … i+3, from every fourth column.
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int j = 0; j < 4; j++) {
        const __m512 even = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88),
                     odd = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
        const __m512 even_below = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
        const __m512 odd_below = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
        _mm512_storeu_ps(out + 16 * j, _mm512_shuffle_f32x4(even, even_below, 0x88));
        _mm512_storeu_ps(out + 16 * (j + 4), _mm512_shuffle_f32x4(odd, odd_below, 0x88));
        _mm512_storeu_ps(out + 16 * (j + 8), _mm512_shuffle_f32x4(even, even_below, 0xdd));
        _mm512_storeu_ps(out + 16 * (j + 12), _mm512_shuffle_f32x4(odd, odd_below, 0xdd));
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) std::memcpy(out + 16 * j + i, in + 16 * i + j, sizeof(float));
#endif
}

// Up to kGroupTokens rows of x: for every kTileFeatures of them column_tiles() tiles. Part d of row m is column
// d · rows + m.
struct PackedTokens {
    int rows;
    const bf16_t* tiles;
    const float* least;  // products of row m that are smaller in magnitude are computed again
};

// Below this, parts of x could be subnormal; of the largest magnitude in a row.
constexpr float kSmall = 0x1p-60f;

// What the products of a row must reach so that what tiles lose of subnormal numbers is less than their rounding: each
// of K products loses at most 2^-126 of itself, and as much of its weight.
inline float least_product(const float* x, int64_t features) {
    Vec high = zero(), low = zero();
    for (int64_t k = 0; k < features; k += kLanes) {
        const Vec v = load_n(x + k, min(kLanes, features - k));
        high = max(high, v);
        low = min(low, v);
    }
    float lanes[kLanes], largest = 0;
    store(lanes, max(high, sub(zero(), low)));
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    if (largest == 0) return 0;
    if (largest < kSmall) return __builtin_inff();
    return 0x1p-100f * static_cast<float>(features) * (largest > 1 ? largest : 1);
}

// Steps first … last-1 of kTileFeatures features.
inline void pack_tokens(const float* x, int64_t x_row_stride, int rows, int64_t features, int64_t first, int64_t last,
                        bf16_t* tiles) {
    alignas(kTileBytes) bf16_t columns[kTokenParts * kGroupTokens][kTileFeatures];
    const int count = static_cast<int>(column_tiles(rows));
    std::memset(columns, 0, sizeof columns);
    for (int64_t step = first; step < last; step++) {
        for (int m = 0; m < rows; m++)
            for (int i = 0; i < kTileFeatures; i += kLanes) {
                const int64_t k = step * kTileFeatures + i;
                Vec rest = k < features ? load_n(x + m * x_row_stride + k, min(kLanes, features - k)) : zero();
                for (int d = 0; d < kTokenParts; d++) {
                    bf16_t* part = columns[d * rows + m] + i;
                    store(part, rest);
                    rest = sub(rest, load(part));
                }
            }
        for (int t = 0; t < count; t++)
            transpose(reinterpret_cast<const float*>(columns[t * kTileRows]),
                      reinterpret_cast<float*>(tiles + (step * count + t) * 2 * kTileFloats));
    }
}

// Rows of W from some row on; those beyond `rows` do not exist.
struct WeightRows {
    const bf16_t* weight;
    int64_t row_stride, features, rows;
};

// Sixteen rows from `row` on and 32 features from k on. What does not exist is zero.
template <int T>
inline void load_weights(const WeightRows& p, int64_t row, int64_t k) {
    const bf16_t* source = p.weight + row * p.row_stride + k;
    if (row + kTileRows <= p.rows && k + kTileFeatures <= p.features)
        return tile_loadd<T>(source, p.row_stride * static_cast<int64_t>(sizeof(bf16_t)));
    alignas(kTileBytes) bf16_t padded[kTileRows][kTileFeatures] = {};
    const int64_t rows = min(kTileRows, p.rows - row), count = min(kTileFeatures, p.features - k);
    for (int64_t r = 0; r < rows; r++) std::memcpy(padded[r], source + r * p.row_stride, count * sizeof(bf16_t));
    tile_loadd<T>(padded, kTileBytes);
}

template <int I>
struct Index {
    static constexpr int value = I;
};

// body(Index<0>()), …, body(Index<N-1>()).
template <int N, int I = 0, typename Body>
inline void unrolled(const Body& body) {
    if constexpr (I < N) {
        body(Index<I>());
        unrolled<N, I + 1>(body);
    }
}

// R tiles of W's rows times T tiles of columns, into R · T tiles of sums.
template <int R, int T>
inline void multiply_tiles(const WeightRows& w, const bf16_t* x, float* sums) {
    // Several sums hide how long a product takes. All tiles of x are held where there is room.
    constexpr int kX = R * T, kHeld = kX + T < kTiles ? T : 1, kW = kX + kHeld, kWeights = kTiles - kW;
    static_assert(kWeights > 0, "too many sums");
    unrolled<R * T>([](auto i) { tile_zero<i.value>(); });
    for (int64_t k = 0; k < w.features; k += kTileFeatures, x += T * 2 * kTileFloats) {
        const auto load_tokens = [x](auto t) {
            tile_loadd<kX + t.value % kHeld>(x + t.value * 2 * kTileFloats, kTileBytes);
        };
        if constexpr (kHeld == T) unrolled<T>(load_tokens);
        unrolled<R>([&](auto r) {
            constexpr int kRow = r.value, kWeight = kW + kRow % kWeights;
            load_weights<kWeight>(w, kRow * kTileRows, k);
            unrolled<T>([&](auto t) {
                if constexpr (kHeld < T) load_tokens(t);
                tile_dpbf16ps<kRow * T + t.value, kWeight, kX + t.value % kHeld>();
            });
        });
    }
    unrolled<R * T>([sums](auto i) { tile_stored<i.value>(sums + i.value * kTileFloats, kTileBytes); });
}

// Sums of sixteen rows of W, as tiles leave them, as one row for each row of x.
template <int T>
inline void add_parts(const float* sums, int rows, float* totals) {
    if (T == kTokenParts && rows == kGroupTokens) {  // a tile has one part
        float added[kTileFloats];
        for (int i = 0; i < kTileFloats; i++) added[i] = (sums[2 * kTileFloats + i] + sums[kTileFloats + i]) + sums[i];
        return transpose(added, totals);
    }
    float columns[T * kTileFloats];
    for (int t = 0; t < T; t++) transpose(sums + t * kTileFloats, columns + t * kTileFloats);
    const float *first = columns, *second = first + rows * kTileRows, *third = second + rows * kTileRows;
    for (int i = 0; i < rows * kTileRows; i++) totals[i] = (third[i] + second[i]) + first[i];
}

inline bool all_settled(const float* totals, float least) {
    int unsettled = 0;
    for (int i = 0; i < kTileRows; i++) {
        const float magnitude = __builtin_fabsf(totals[i]);
        unsettled |= !(magnitude >= least) | !(magnitude <= __FLT_MAX__);
    }
    return !unsettled;
}

// A group of rows of x from m on times R · 16 rows of W from n on.
template <int R, int T, typename Store>
inline void multiply_panel(const LinearOperands<bf16_t>& p, const PackedTokens& x, int64_t m, int64_t n, int64_t last,
                           const Store& store) {
    alignas(kTileBytes) float sums[R * T * kTileFloats];
    multiply_tiles<R, T>({p.weight + n * p.weight_row_stride, p.weight_row_stride, p.in_features, last - n}, x.tiles,
                         sums);
    for (int r = 0; r < R && n < last; r++, n += kTileRows) {
        float totals[kTileFloats];
        const int count = static_cast<int>(min(kTileRows, last - n));
        add_parts<T>(sums + r * T * kTileFloats, x.rows, totals);
        for (int i = 0; i < x.rows; i++) {
            float* const row = totals + i * kTileRows;
            if (!all_settled(row, x.least[i]))
                for (int j = 0; j < count; j++)
                    if (!(__builtin_fabsf(row[j]) >= x.least[i]) || !(__builtin_fabsf(row[j]) <= __FLT_MAX__))
                        multiply_tokens<bf16_t, 1>(p, m + i, n + j, n + j + 1,
                                                   [row, j](int64_t, int64_t, float total) { row[j] = total; });
            store(m + i, n, row, count);
        }
    }
}

template <int R, int T, typename Store>
inline void multiply_panels(const LinearOperands<bf16_t>& p, const PackedTokens& x, int64_t m, int64_t n, int64_t last,
                            const Store& store) {
    for (; n + R * kTileRows <= last; n += R * kTileRows) multiply_panel<R, T>(p, x, m, n, last, store);
    for (; n < last; n += kTileRows) multiply_panel<1, T>(p, x, m, n, last, store);
}

// A group of rows of x from m on times rows first … last-1 of W: calls store(m, n, sums, count) for `count` of W's rows
// from n on.
template <typename Store>
inline void multiply_group_by_tiles(const LinearOperands<bf16_t>& p, const PackedTokens& x, int64_t m, int64_t first,
                                    int64_t last, const Store& store) {
    switch (column_tiles(x.rows)) {
        case 1: return multiply_panels<2, 1>(p, x, m, first, last, store);
        case 2: return multiply_panels<2, 2>(p, x, m, first, last, store);
        default: return multiply_panels<2, 3>(p, x, m, first, last, store);
    }
}

}  // namespace speculative_mamba::SM_ISA
