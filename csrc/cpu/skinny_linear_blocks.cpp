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
    const bool scaled = p.y_scale != 1;
    const auto store = [&p, scaled](int64_t m, int64_t n, float total) {
        if (scaled) total *= p.y_scale;
        p.y[m * p.out_features + n] = p.bias ? total + p.bias[n] : total;
    };
    parallel_for(p.out_features, grain, p.rows * p.in_features * p.out_features, threads,
                 [&](int64_t first, int64_t last) { multiply_blocks(operands, 0, p.rows, first, last, store); });
}

}  // namespace

void skinny_linear_blocks(const SkinnyLinearParams& p, int threads) {
    switch (p.weight_dtype) {
        case DType::q8_0: return run<Q8_0>(p, threads);
        case DType::q4_0: return run<Q4_0>(p, threads);
        case DType::q4_k: return run<Q4_K>(p, threads);
        case DType::q6_k: return run<Q6_K>(p, threads);
        default: throw_unknown_dtype(p.weight_dtype);
    }
}

}  // namespace speculative_mamba::SM_ISA
