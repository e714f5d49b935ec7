// skinny_linear for weights in bfloat16, by tiles; y_scale and the bias come last.
#include "../params.h"
#include "linear_tiles.h"

namespace speculative_mamba::SM_ISA {
namespace {

struct Output {
    const SkinnyLinearParams& p;

    void operator()(int64_t m, int64_t n, const float* sums, int count) const {
        Vec y = load(sums);
        if (p.y_scale != 1) y = mul(y, broadcast(p.y_scale));
        if (p.bias) y = add(y, load_n(p.bias + n, count));
        store_n(p.y + m * p.out_features + n, y, count);
    }
};

}  // namespace

void skinny_linear_tiles(const SkinnyLinearParams& p, int threads) {
    const LinearOperands<bf16_t> operands{p.x, p.x_row_stride, static_cast<const bf16_t*>(p.weight),
                                          p.weight_row_stride, p.in_features};
    const TokenGroups x(operands, p.rows, threads);
    parallel_for(p.out_features, rows_of_chunk(operands, x, p.out_features, threads),
                 p.rows * p.in_features * p.out_features, threads, [&](int64_t first, int64_t last) {
                     TileScope scope;
                     multiply_rows_by_tiles(operands, x, first, last, Output{p});
                 });
}

}  // namespace speculative_mamba::SM_ISA
