// Experts in blocks: the products of linear_blocks.h for the choices of expert_choices.h.
#include "expert_choices.h"
#include "linear_blocks.h"

namespace speculative_mamba::SM_ISA {
namespace {

template <typename Format>
void run(const ExpertLinearParams& p, int threads) {
    const SortedChoices choices(p);
    const auto x =
        rounded_rows<Format>(choices.size(), p.in_features, threads, [&choices](int64_t i) { return choices.x(i); });
    const int64_t grain = block_rows_of_chunk(p.weight_row_stride, p.out_features, threads, kExpertChunkBytes);
    parallel_for(p.out_features, grain, choices.size() * p.in_features * p.out_features, threads,
                 [&](int64_t first, int64_t last) {
                     choices.collect(first, last, [&](int64_t e, int64_t, const auto& store) {
                         const auto* weight = static_cast<const uint8_t*>(p.weight) + p.offsets[e];
                         const BlockOperands<Format> operands{x, weight, p.weight_row_stride, p.in_features,
                                                              p.out_features};
                         const int64_t begin = choices.begin(e), count = choices.begin(e + 1) - begin;
                         multiply_blocks(operands, begin, count, first, last,
                                         [&store](int64_t m, int64_t n, const float* sums, int64_t outputs) {
                                             for (int64_t i = 0; i < outputs; i++) store(m, n + i, sums[i]);
                                         });
                     });
                 });
}

}  // namespace

void expert_linear_blocks(const ExpertLinearParams& p, int threads) {
    with_format(p.weight_dtype, [&](auto format) { run<typename decltype(format)::type>(p, threads); });
}

}  // namespace speculative_mamba::SM_ISA
