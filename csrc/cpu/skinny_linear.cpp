// The products of linear_rows.h; y_scale and the bias come last. Weights in blocks have a kernel of their own,
// skinny_linear_blocks.cpp; where there are tiles, those in bfloat16 too.
#include "linear_output.h"
#include "linear_rows.h"

namespace speculative_mamba::SM_ISA {
namespace {

template <typename scalar_t>
void run(const SkinnyLinearParams& p, int threads) {
    const int64_t grain = rows_of_chunk<scalar_t>(p.in_features, p.out_features, threads);
    const int64_t work = p.rows * p.in_features * p.out_features;
    const bool scaled = p.y_scale != 1;
    const auto store = [&p, scaled](int64_t m, int64_t n, float total) {
        if (scaled) total *= p.y_scale;
        p.y[m * p.out_features + n] = p.bias ? total + p.bias[n] : total;
    };
    const LinearOperands<scalar_t> operands{p.x, p.x_row_stride, static_cast<const scalar_t*>(p.weight),
                                            p.weight_row_stride, p.in_features};
    parallel_for(p.out_features, grain, work, threads, [&](int64_t first, int64_t last) {
        if (p.in_features <= kLanes) multiply_short_rows(operands, p.rows, first, last, LinearOutput{p});
        else multiply_rows(operands, p.rows, first, last, store);
    });
}

}  // namespace

void skinny_linear_blocks(const SkinnyLinearParams& p, int threads);
void skinny_linear_tiles(const SkinnyLinearParams& p, int threads);

// Whether tiles come sooner: where rows are long, or hold no part of a tile.
[[maybe_unused]] bool are_tiled(int64_t features) { return features >= 512 || features % 32 == 0; }

void skinny_linear(const SkinnyLinearParams& p, int threads) {
    if (is_blocks(p.weight_dtype)) return skinny_linear_blocks(p, threads);
#if defined(SM_TILES)
    if (p.weight_dtype == DType::bfloat16 && are_tiled(p.in_features)) return skinny_linear_tiles(p, threads);
#endif
    SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
