// Weights are read once, in the row-major order in which checkpoints store them. Lanes run over K: lane l of an output
// sums features l, l+16, l+32, … one after the other, then the lanes are added in a fixed tree. Neither how many rows
// share a pass nor which thread runs it enters that order, so a row of y depends on its row of x alone.
#include "../params.h"
#include "parallel_for.h"
#include "simd.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Rows of x × rows of W held in accumulators at a time, by what fits the register file.
#if defined(__AVX512F__)
constexpr int kMaxTokens = 6, kWeightRows = 4;
#else
constexpr int kMaxTokens = 5, kWeightRows = 1;
#endif
constexpr int64_t kPrefetch = 1024;  // bytes ahead in every weight row

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

template <typename scalar_t, int M, int R>
inline void tile(const SkinnyLinearParams& p, int64_t m0, int64_t n0) {
    const int64_t whole = p.in_features / kLanes * kLanes, rest = p.in_features - whole;
    const float* x = p.x + m0 * p.x_row_stride;
    const scalar_t* weight = static_cast<const scalar_t*>(p.weight) + n0 * p.weight_row_stride;
    Vec sums[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = zero();
    for (int64_t k = 0; k < whole; k += kLanes) {
        Vec w[R];
        for (int r = 0; r < R; r++) {
            const scalar_t* source = weight + r * p.weight_row_stride + k;
            w[r] = load(source);
            prefetch(reinterpret_cast<const char*>(source) + kPrefetch);
        }
        for (int m = 0; m < M; m++) {
            Vec input = load(x + m * p.x_row_stride + k);
            for (int r = 0; r < R; r++) sums[r][m] = fma(w[r], input, sums[r][m]);
        }
    }
    if (rest) {
        for (int r = 0; r < R; r++) {
            Vec w = load_partial(weight + r * p.weight_row_stride + whole, rest);
            for (int m = 0; m < M; m++)
                sums[r][m] = fma(w, load_partial(x + m * p.x_row_stride + whole, rest), sums[r][m]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) p.y[(m0 + m) * p.out_features + n0 + r] = sum(sums[r][m]);
}

template <typename scalar_t, int R>
inline void weight_rows(const SkinnyLinearParams& p, int64_t n) {
    int64_t m = 0;
    for (; m + kMaxTokens <= p.rows; m += kMaxTokens) tile<scalar_t, kMaxTokens, R>(p, m, n);
    switch (p.rows - m) {
        case 1: return tile<scalar_t, 1, R>(p, m, n);
        case 2: return tile<scalar_t, 2, R>(p, m, n);
        case 3: return tile<scalar_t, 3, R>(p, m, n);
        case 4: return tile<scalar_t, 4, R>(p, m, n);
        case 5:
            if constexpr (kMaxTokens > 5) return tile<scalar_t, 5, R>(p, m, n);
    }
}

template <typename scalar_t>
void run(const SkinnyLinearParams& p, int threads) {
    // Chunks of about 64 KiB of weights: long enough to hide their hand-out, short enough to end together.
    int64_t grain = divide_up(64 * 1024, p.in_features * static_cast<int64_t>(sizeof(scalar_t)));
    grain = divide_up(smaller(grain, divide_up(p.out_features, 2 * threads)), kWeightRows) * kWeightRows;
    const int64_t work = p.rows * p.in_features * p.out_features;
    parallel_for(p.out_features, grain, work, threads, [&](int64_t n, int64_t last) {
        for (; n + kWeightRows <= last; n += kWeightRows) weight_rows<scalar_t, kWeightRows>(p, n);
        for (; n < last; n++) weight_rows<scalar_t, 1>(p, n);
    });
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& p, int threads) {
    SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
