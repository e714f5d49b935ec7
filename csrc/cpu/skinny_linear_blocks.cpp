// Weights in blocks: the products of linear_blocks.h; y_scale and the bias come last. x is rounded once per call.
#include "../params.h"
#include "linear_blocks.h"

namespace speculative_mamba::SM_ISA {
namespace {

template <typename Format>
void run(const SkinnyLinearParams& p, int threads) {
    const auto row_of = [&p](int64_t m) { return p.x + m * p.x_row_stride; };
    const BlockOperands<Format> operands{rounded_rows<Format>(p.rows, p.in_features, threads, row_of),
                                         static_cast<const uint8_t*>(p.weight), p.weight_row_stride, p.in_features,
                                         p.out_features};
    const int64_t grain = block_rows_of_chunk(p.weight_row_stride, p.out_features, threads);
    const auto store = [&p](int64_t m, int64_t n, const float* sums, int64_t count) {
        float* const y = p.y + m * p.out_features + n;
        for (int64_t i = 0; i < count; i++) {
            const float sum = p.y_scale != 1 ? sums[i] * p.y_scale : sums[i];
            y[i] = p.bias ? sum + p.bias[n + i] : sum;
        }
    };
    parallel_for(p.out_features, grain, p.rows * p.in_features * p.out_features, threads,
                 [&](int64_t first, int64_t last) { multiply_blocks(operands, 0, p.rows, first, last, store); });
}

}  // namespace

void skinny_linear_blocks(const SkinnyLinearParams& p, int threads) {
    with_format(p.weight_dtype, [&](auto format) { run<typename decltype(format)::type>(p, threads); });
}

}  // namespace speculative_mamba::SM_ISA
