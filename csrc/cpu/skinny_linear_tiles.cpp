// skinny_linear for weights in bfloat16, by tiles.
#include "../params.h"
#include "linear_tiles.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Rows of W in a chunk that a thread takes: for a few rows of x a panel, for many as much as stays in the second-level
// cache while they go through it in groups.
int64_t rows_of_chunk(const SkinnyLinearParams& p, int threads) {
    const int64_t row_bytes = p.in_features * static_cast<int64_t>(sizeof(bf16_t)) + 1;
    const int64_t rows = p.rows <= kGroupTokens ? 64 : divide_up(512 * 1024 / row_bytes, 64) * 64;
    return divide_up(min(rows, divide_up(p.out_features, 2 * threads)), kTileRows) * kTileRows;
}

}  // namespace

void skinny_linear_tiles(const SkinnyLinearParams& p, int threads) {
    const int64_t groups = divide_up(p.rows, kGroupTokens), steps = divide_up(p.in_features, kTileFeatures);
    const int64_t group_size = steps * kTokenParts * 2 * kTileFloats, items = groups * steps;
    thread_local Buffer packed, limits;
    bf16_t* const tiles = packed.reserve<bf16_t>(groups * group_size);
    float* const least = limits.reserve<float>(p.rows);
    const auto rows_of = [&p](int64_t group) {
        return static_cast<int>(min(kGroupTokens, p.rows - group * kGroupTokens));
    };
    const int64_t work_of_item = 2 * kGroupTokens * kTileFeatures;
    parallel_for(items, divide_up(items, 2 * threads), items * work_of_item, threads, [&](int64_t first, int64_t last) {
        while (first < last) {
            const int64_t group = first / steps, step = first % steps, end = min(steps, step + last - first);
            const int64_t m = group * kGroupTokens;
            const float* const x = p.x + m * p.x_row_stride;
            const int rows = rows_of(group);
            pack_tokens(x, p.x_row_stride, rows, p.in_features, step, end, tiles + group * group_size);
            for (int i = 0; i < rows && step == 0; i++)
                least[m + i] = least_product(x + i * p.x_row_stride, p.in_features);
            first += end - step;
        }
    });
    const bool scaled = p.y_scale != 1;
    const auto store = [&p, scaled](int64_t m, int64_t n, float* sums, int count) {
        float* const y = p.y + m * p.out_features + n;
        const float* const bias = p.bias ? p.bias + n : nullptr;
        if (scaled)
            for (int i = 0; i < count; i++) sums[i] *= p.y_scale;
        if (bias)
            for (int i = 0; i < count; i++) y[i] = sums[i] + bias[i];
        else
            for (int i = 0; i < count; i++) y[i] = sums[i];
    };
    const LinearOperands<bf16_t> operands{p.x, p.x_row_stride, static_cast<const bf16_t*>(p.weight),
                                          p.weight_row_stride, p.in_features};
    parallel_for(p.out_features, rows_of_chunk(p, threads), p.rows * p.in_features * p.out_features, threads,
                 [&](int64_t first, int64_t last) {
                     TileScope scope;
                     for (int64_t group = 0; group < groups; group++) {
                         const int64_t m = group * kGroupTokens;
                         const PackedTokens x{rows_of(group), tiles + group * group_size, least + m};
                         multiply_group_by_tiles(operands, x, m, first, last, store);
                     }
                 });
}

}  // namespace speculative_mamba::SM_ISA
