// Weights in blocks: the products of linear_blocks.h; y_scale and the bias come last. x is rounded once per call, or
// per thread.
#include "../params.h"
#include "linear_blocks.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Values of x up to which every thread rounds all of them: the other one's cache lines would take longer to come.
constexpr int64_t kRoundedByEach = 16 * 1024;

template <typename Format>
void run(const SkinnyLinearParams& p, int threads) {
    using Inputs = BlockInputs<DotOf<Format::kLargest>>;
    const auto rounded = [&p](int by_threads) {
        const auto row_of = [&p](int64_t m) { return p.x + m * p.x_row_stride; };
        return rounded_rows<Format>(p.rows, p.in_features, by_threads, row_of);
    };
    const auto store = [&p](int64_t m, int64_t n, const float* sums, int64_t count) {
        float* const y = p.y + m * p.out_features + n;
        for (int64_t i = 0; i < count; i++) {
            const float sum = p.y_scale != 1 ? sums[i] * p.y_scale : sums[i];
            y[i] = p.bias ? sum + p.bias[n + i] : sum;
        }
    };
    const auto multiply = [&](const Inputs& x, int64_t first, int64_t last) {
        const BlockOperands<Format> operands{x, static_cast<const uint8_t*>(p.weight), p.weight_row_stride,
                                             p.in_features, p.out_features};
        multiply_blocks(operands, 0, p.rows, first, last, store);
    };
    const int64_t grain = block_rows_of_chunk(p.weight_row_stride, p.out_features, threads);
    const int64_t work = p.rows * p.in_features * p.out_features;
    if (p.rows * p.in_features > kRoundedByEach) {
        const Inputs x = rounded(threads);
        return parallel_for(p.out_features, grain, work, threads,
                            [&](int64_t first, int64_t last) { multiply(x, first, last); });
    }
    const FirstInThread first_in_thread;
    parallel_for(p.out_features, grain, work, threads,
                 [&](int64_t first, int64_t last) { multiply(rounded(first_in_thread() ? 1 : 0), first, last); });
}

}  // namespace

void skinny_linear_blocks(const SkinnyLinearParams& p, int threads) {
    with_format(p.weight_dtype, [&](auto format) { run<typename decltype(format)::type>(p, threads); });
}

}  // namespace speculative_mamba::SM_ISA
