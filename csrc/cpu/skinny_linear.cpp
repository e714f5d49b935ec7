// Weights are read once, in the row-major order in which checkpoints store them. Lanes run over K: lane l of an output
// sums features l, l+16, l+32, … one after the other, then the lanes are added in a fixed tree. Neither how many rows
// share a pass nor which thread runs it enters that order, so a row of y depends on its row of x alone.
#include "../params.h"
#include "parallel_for.h"
#include "simd.h"

namespace speculative_mamba::SM_ISA {
namespace {

// M rows of x × R rows of W are held in accumulators at a time: as many as the register file takes.
#if defined(__AVX512F__)
constexpr int kMaxTokens = 6;
constexpr int weight_rows(int M) { return M == 1 ? 8 : 4; }
#else
constexpr int kMaxTokens = 5;
constexpr int weight_rows(int M) { return M == 1 ? 4 : M <= 3 ? 2 : 1; }
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
    // Near the end of these rows the rows of the next tile are fetched, so that no tile starts cold.
    auto span = [&](int64_t k, int64_t last, int64_t ahead) {
        for (; k < last; k += kLanes) {
            Vec w[R];
            for (int r = 0; r < R; r++) {
                const scalar_t* source = weight + r * p.weight_row_stride + k;
                w[r] = load(source);
                prefetch(source + ahead);
            }
            for (int m = 0; m < M; m++) {
                Vec input = load(x + m * p.x_row_stride + k);
                for (int r = 0; r < R; r++) sums[r][m] = fma(w[r], input, sums[r][m]);
            }
        }
    };
    constexpr int64_t ahead = kPrefetch / sizeof(scalar_t);
    const int64_t turn = smaller(whole, whole > ahead ? whole - ahead : 0) / kLanes * kLanes;
    span(0, turn, ahead);
    span(turn, whole, ahead - p.in_features + R * p.weight_row_stride);
    if (rest) {
        Vec input[M];
        for (int m = 0; m < M; m++) input[m] = load_partial(x + m * p.x_row_stride + whole, rest);
        for (int r = 0; r < R; r++) {
            Vec w = load_partial(weight + r * p.weight_row_stride + whole, rest);
            for (int m = 0; m < M; m++) sums[r][m] = fma(w, input[m], sums[r][m]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) p.y[(m0 + m) * p.out_features + n0 + r] = sum(sums[r][m]);
}

template <typename scalar_t, int M>
inline void token_rows(const SkinnyLinearParams& p, int64_t m, int64_t n, int64_t last) {
    constexpr int R = weight_rows(M);
    for (; n + R <= last; n += R) tile<scalar_t, M, R>(p, m, n);
    for (; n < last; n++) tile<scalar_t, M, 1>(p, m, n);
}

template <typename scalar_t>
void run(const SkinnyLinearParams& p, int threads) {
    // Chunks of about 64 KiB of weights: long enough to hide their hand-out, short enough to end together, and for many
    // rows of x small enough to be found in the cache again by the next tile.
    const int64_t row_bytes = p.in_features * static_cast<int64_t>(sizeof(scalar_t));
    int64_t grain = divide_up(64 * 1024, row_bytes > 0 ? row_bytes : 1);
    grain = divide_up(smaller(grain, divide_up(p.out_features, 2 * threads)), 8) * 8;
    const int64_t work = p.rows * p.in_features * p.out_features;
    parallel_for(p.out_features, grain, work, threads, [&](int64_t first, int64_t last) {
        int64_t m = 0;
        for (; m + kMaxTokens <= p.rows; m += kMaxTokens) token_rows<scalar_t, kMaxTokens>(p, m, first, last);
        switch (p.rows - m) {
            case 1: return token_rows<scalar_t, 1>(p, m, first, last);
            case 2: return token_rows<scalar_t, 2>(p, m, first, last);
            case 3: return token_rows<scalar_t, 3>(p, m, first, last);
            case 4: return token_rows<scalar_t, 4>(p, m, first, last);
            case 5:
                if constexpr (kMaxTokens > 5) return token_rows<scalar_t, 5>(p, m, first, last);
        }
    });
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& p, int threads) {
    SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
