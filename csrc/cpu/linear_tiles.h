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
#include "transpose.h"

namespace speculative_mamba::SM_ISA {

constexpr int kTokenParts = 3, kTileFeatures = 32, kTileFloats = 256;
constexpr int kGroupTokens = 16;  // rows of x whose parts are columns of kTokenParts tiles at most

inline int64_t column_tiles(int64_t tokens) { return divide_up(tokens * kTokenParts, kTileRows); }

// Up to kGroupTokens rows of x: for every kTileFeatures of them column_tiles() tiles. Part d of row m is column
// d · rows + m.
struct PackedTokens {
    int rows;
    const bf16_t* tiles;
    const float* least;  // products of a row that are smaller in magnitude are computed again
};

// From here on no part of x is subnormal, but zero; and below this, all of a row's could be.
constexpr float kWithoutSubnormalParts = 0x1p-102f, kSmall = 0x1p-60f;

// What the products of a row must reach so that what tiles lose of subnormal numbers is less than their rounding. Each
// of K products loses at most 2^-126 of itself, and as much of x for a subnormal weight; and of a weight, which is
// below 2^60, for a subnormal part of x.
inline float least_product(const float* x, int64_t features) {
    const Vec infinity = broadcast(__builtin_inff());
    Vec largest_of_lanes = zero(), smallest_of_lanes = infinity;  // of those that are not zero
    for (int64_t k = 0; k < features; k += kLanes) {
        const Vec v = load_n(x + k, min(kLanes, features - k)), magnitude = max(v, sub(zero(), v));
        largest_of_lanes = max(largest_of_lanes, magnitude);
        smallest_of_lanes = min(smallest_of_lanes, if_zero(magnitude, infinity, magnitude));
    }
    float lanes[kLanes], largest = 0, smallest = __builtin_inff();
    store(lanes, largest_of_lanes);
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    store(lanes, smallest_of_lanes);
    for (float lane : lanes) smallest = lane < smallest ? lane : smallest;
    if (largest == 0) return 0;
    if (largest < kSmall) return __builtin_inff();
    const float of_one = smallest < kWithoutSubnormalParts ? 0x1p-40f : 0x1p-100f;
    return of_one * static_cast<float>(features) * (largest > 1 ? largest : 1);
}

// The upper halves of 32 values become bfloat16; `values` keeps what is left of them, exactly.
inline void split(Vec (&values)[2], bf16_t* part) {
#if defined(__AVX512F__)
    alignas(kTileBytes) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                                23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                                45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i low = _mm512_castps_si512(values[0].v), high = _mm512_castps_si512(values[1].v);
    _mm512_storeu_si512(part, _mm512_permutex2var_epi16(low, _mm512_load_si512(kUpper), high));
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (Vec& value : values) {
        const __m512i upper = _mm512_and_si512(_mm512_castps_si512(value.v), mask);
        value.v = _mm512_sub_ps(value.v, _mm512_castsi512_ps(upper));
    }
#else
    float lanes[kTileFeatures];
    store(lanes, values[0]), store(lanes + kLanes, values[1]);
    for (int i = 0; i < kTileFeatures; i++) {
        uint32_t bits;
        float upper;
        std::memcpy(&bits, lanes + i, sizeof bits);
        part[i].bits = static_cast<uint16_t>(bits >> 16);
        bits &= 0xffff0000u;
        std::memcpy(&upper, &bits, sizeof upper);
        lanes[i] -= upper;
    }
    values[0] = load(lanes), values[1] = load(lanes + kLanes);
#endif
}

// Parts of kTileFeatures features of a row from k on, so many values apart. What does not exist is zero. Each part has
// eight of the 24 bits of a value. Of infinities and NaN at least one part is not finite either.
inline void split_features(const float* x, int64_t k, int64_t features, bf16_t* parts, int64_t stride) {
    const auto values = [&](int64_t k) { return k < features ? load_n(x + k, min(kLanes, features - k)) : zero(); };
    Vec rest[2] = {values(k), values(k + kLanes)};
    for (int d = 0; d < kTokenParts; d++) split(rest, parts + d * stride);
}

// Steps first … last-1 of kTileFeatures features.
inline void pack_tokens(const float* x, int64_t x_row_stride, int rows, int64_t features, int64_t first, int64_t last,
                        bf16_t* tiles) {
    alignas(kTileBytes) bf16_t columns[kTokenParts * kGroupTokens][kTileFeatures];
    const int count = static_cast<int>(column_tiles(rows));
    std::memset(columns, 0, sizeof columns);
    for (int64_t step = first; step < last; step++) {
        for (int m = 0; m < rows; m++)
            split_features(x + m * x_row_stride, step * kTileFeatures, features, columns[m], rows * kTileFeatures);
        for (int t = 0; t < count; t++)
            transpose(reinterpret_cast<const float*>(columns[t * kTileRows]),
                      reinterpret_cast<float*>(tiles + (step * count + t) * 2 * kTileFloats));
    }
}

// All rows of x in groups, packed by so many threads in memory of the calling one, which has them already if `threads`
// is 0.
class TokenGroups {
 public:
    TokenGroups(const LinearOperands<bf16_t>& p, int64_t rows, int threads)
        : rows_(rows), steps_(divide_up(p.in_features, kTileFeatures)) {
        thread_local Buffer tiles, least;
        tiles_ = tiles.reserve<bf16_t>(count() * group_size());
        least_ = least.reserve<float>(rows);
        if (threads == 0) return;
        const int64_t items = count() * steps_, work_of_item = 2 * kGroupTokens * kTileFeatures;
        parallel_for(items, divide_up(items, 2 * threads), items * work_of_item, threads,
                     [&](int64_t first, int64_t last) { pack(p, first, last); });
    }
    int64_t count() const { return divide_up(rows_, kGroupTokens); }
    int64_t group_size() const { return steps_ * kTokenParts * kTileRows * kTileFeatures; }
    PackedTokens operator[](int64_t group) const {
        const int64_t m = group * kGroupTokens;
        return {static_cast<int>(min(kGroupTokens, rows_ - m)), tiles_ + group * group_size(), least_ + m};
    }

 private:
    // Items are groups times steps.
    void pack(const LinearOperands<bf16_t>& p, int64_t first, int64_t last) const {
        while (first < last) {
            const int64_t group = first / steps_, step = first % steps_, end = min(steps_, step + last - first);
            const float* const x = p.x + group * kGroupTokens * p.x_row_stride;
            const int rows = (*this)[group].rows;
            for (int m = 0; m < rows && step == 0; m++)
                least_[group * kGroupTokens + m] = least_product(x + m * p.x_row_stride, p.in_features);
            pack_tokens(x, p.x_row_stride, rows, p.in_features, step, end, tiles_ + group * group_size());
            first += end - step;
        }
    }

    int64_t rows_, steps_;
    bf16_t* tiles_;
    float* least_;
};

// Rows of W in a panel: as many streams as memory serves at once.
constexpr int kPanelTiles = 2, kPanelRows = kPanelTiles * kTileRows;

// Rows of W from some row on; those beyond `rows` do not exist.
struct WeightRows {
    const bf16_t* weight;
    int64_t row_stride, features, rows;

    // Whether sixteen rows from `row` on and 32 features from k on all exist.
    bool has(int64_t row, int64_t k) const { return row + kTileRows <= rows && k + kTileFeatures <= features; }
    // What does not exist is zero.
    template <int T>
    void load(int64_t row, int64_t k) const {
        const bf16_t* source = weight + row * row_stride + k;
        if (has(row, k)) return tile_loadd<T>(source, row_stride * static_cast<int64_t>(sizeof(bf16_t)));
        alignas(kTileBytes) bf16_t tile[kTileRows][kTileFeatures];
        copy(row, k, tile);
        tile_loadd<T>(tile, kTileBytes);
    }
    // The first features of rows that come next, while no tile is loaded; from there on processors see an order.
    void fetch(int64_t first, int64_t last) const {
        for (int64_t row = first; row < min(last, rows); row++)
            for (int64_t k = 0; k < min(2 * kTileFeatures, features); k += kTileFeatures)
                prefetch(weight + row * row_stride + k);
    }
    void copy(int64_t row, int64_t k, bf16_t (*tile)[kTileFeatures]) const {
        const int64_t count = min(kTileFeatures, features - k);
        for (int64_t r = row; r < row + kTileRows; r++, tile++) {
            if (r < rows && count == kTileFeatures) {
                std::memcpy(*tile, weight + r * row_stride + k, kTileBytes);
            } else {
                std::memset(*tile, 0, kTileBytes);
                if (r < rows) std::memcpy(*tile, weight + r * row_stride + k, count * sizeof(bf16_t));
            }
        }
    }
};

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
template <int R, int T, typename Weights>
inline void multiply_tiles(const Weights& w, const bf16_t* x, int64_t features, float* sums) {
    // Several sums hide how long a product takes. All tiles of x are held where there is room.
    constexpr int kX = R * T, kHeld = kX + T < kTiles ? T : 1, kW = kX + kHeld, kWeights = kTiles - kW;
    static_assert(kWeights > 0, "too many sums");
    unrolled<R * T>([](auto i) { tile_zero<i.value>(); });
    for (int64_t k = 0; k < features; k += kTileFeatures, x += T * 2 * kTileFloats) {
        const auto load_tokens = [x](auto t) {
            tile_loadd<kX + t.value % kHeld>(x + t.value * 2 * kTileFloats, kTileBytes);
        };
        if constexpr (kHeld == T) unrolled<T>(load_tokens);
        unrolled<R>([&](auto r) {
            constexpr int kRow = r.value, kWeight = kW + kRow % kWeights;
            w.template load<kWeight>(kRow * kTileRows, k);
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
#if defined(__AVX512F__)
    if (T == 1 && rows == 1) {  // needs three columns alone
        __m512 four[4];         // columns of rows i, i+4, i+8, i+12
        for (int i = 0; i < 4; i++) {
            four[i] = _mm512_broadcast_f32x4(_mm_loadu_ps(sums + i * kTileRows));
            for (int j = 1; j < 4; j++)
                four[i] = _mm512_mask_broadcast_f32x4(four[i], static_cast<__mmask16>(15 << 4 * j),
                                                      _mm_loadu_ps(sums + (i + 4 * j) * kTileRows));
        }
        const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(four[0], four[1]));
        const __m512d low_below = _mm512_castps_pd(_mm512_unpacklo_ps(four[2], four[3]));
        const __m512 first = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low_below));
        const __m512 second = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low_below));
        const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(four[0], four[1]));
        const __m512d high_below = _mm512_castps_pd(_mm512_unpackhi_ps(four[2], four[3]));
        const __m512 third = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high_below));
        return _mm512_storeu_ps(totals, _mm512_add_ps(_mm512_add_ps(third, second), first));
    }
#endif
    float columns[T * kTileFloats];
    for (int t = 0; t < T; t++) transpose(sums + t * kTileFloats, columns + t * kTileFloats);
    const float *first = columns, *second = first + rows * kTileRows, *third = second + rows * kTileRows;
    for (int i = 0; i < rows * kTileRows; i++) totals[i] = (third[i] + second[i]) + first[i];
}

// Whether sixteen products can stay as tiles have them. Bits of magnitudes compare as these do.
inline bool all_accurate(Vec totals, float least) {
#if defined(__AVX512F__)
    const __m512 magnitudes = _mm512_abs_ps(totals.v);
    const __mmask16 enough = _mm512_cmp_ps_mask(magnitudes, _mm512_set1_ps(least), _CMP_GE_OQ);
    return _mm512_mask_cmp_ps_mask(enough, magnitudes, _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ) == 0xffff;
#else
    uint32_t bits[kTileRows], limit, accurate = 1;
    store(reinterpret_cast<float*>(bits), totals);
    std::memcpy(&limit, &least, sizeof limit);
    for (uint32_t magnitude : bits) {
        magnitude &= 0x7fffffffu;
        accurate &= (magnitude >= limit) & (magnitude < 0x7f800000u);
    }
    return accurate;
#endif
}

// Row m of x times `count` rows of W from n on: `totals`, but for those that are not accurate, which are computed
// again.
inline Vec accurate(const LinearOperands<bf16_t>& p, int64_t m, int64_t n, int count, float least, Vec totals) {
    if (all_accurate(totals, least)) return totals;
    float lanes[kLanes];
    store(lanes, totals);
    for (int i = 0; i < count; i++)
        if (!(__builtin_fabsf(lanes[i]) >= least) || !(__builtin_fabsf(lanes[i]) <= __FLT_MAX__))
            multiply_tokens<bf16_t, 1>(p, m, n + i, n + i + 1,
                                       [&](int64_t, int64_t, float total) { lanes[i] = total; });
    return load(lanes);
}

// A group of rows of x from m on times R · 16 rows of W, `weights`, from n on; those from `last` on do not count.
template <int R, int T, typename Weights, typename Store>
inline void multiply_panel(const LinearOperands<bf16_t>& p, const PackedTokens& x, const Weights& weights, int64_t m,
                           int64_t n, int64_t last, const Store& store) {
    alignas(kTileBytes) float sums[R * T * kTileFloats];
    multiply_tiles<R, T>(weights, x.tiles, p.in_features, sums);
    weights.fetch(R * kTileRows, 2 * R * kTileRows);
    for (int r = 0; r < R && n < last; r++, n += kTileRows) {
        float totals[kTileFloats];
        const int count = static_cast<int>(min(kTileRows, last - n));
        add_parts<T>(sums + r * T * kTileFloats, x.rows, totals);
        for (int i = 0; i < x.rows; i++) {
            const Vec sum = load(totals + i * kTileRows);
            store(m + i, n, accurate(p, m + i, n, count, x.least[i], sum), count);
        }
    }
}

template <int R, typename Weights, typename Store>
inline void multiply_panel(const LinearOperands<bf16_t>& p, const PackedTokens& x, const Weights& weights, int64_t m,
                           int64_t n, int64_t last, const Store& store) {
    switch (column_tiles(x.rows)) {
        case 1: return multiply_panel<R, 1>(p, x, weights, m, n, last, store);
        case 2: return multiply_panel<R, 2>(p, x, weights, m, n, last, store);
        default: return multiply_panel<R, 3>(p, x, weights, m, n, last, store);
    }
}

// All rows of x times rows first … last-1 of W: calls store(m, n, sums, count) for `count` of W's rows from n on.
// Weights are read as they lie, panel by panel, so there should be few groups of x.
template <typename Store>
inline void multiply_few_rows(const LinearOperands<bf16_t>& p, const TokenGroups& x, int64_t first, int64_t last,
                              const Store& store) {
    for (int64_t n = first; n < last; n += kPanelRows) {
        const WeightRows panel{p.weight + n * p.weight_row_stride, p.weight_row_stride, p.in_features, last - n};
        for (int64_t group = 0; group < x.count(); group++) {
            if (n + kTileRows < last)
                multiply_panel<kPanelTiles>(p, x[group], panel, group * kGroupTokens, n, last, store);
            else multiply_panel<1>(p, x[group], panel, group * kGroupTokens, n, last, store);
        }
    }
}

}  // namespace speculative_mamba::SM_ISA
