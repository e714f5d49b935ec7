// The products of linear_rows.h for the choices of expert_choices.h. Weights in blocks have expert_linear_blocks.cpp.
#include "expert_choices.h"
#include "linear_rows.h"

namespace speculative_mamba::SM_ISA {
namespace {

template <typename scalar_t>
void run(const ExpertLinearParams& p, int threads) {
    const SortedChoices choices(p);
    const int64_t features = p.in_features;
    thread_local Buffer inputs;
    float* const x = inputs.reserve<float>(choices.size() * features);
    for (int64_t i = 0; i < choices.size(); i++) std::memcpy(x + i * features, choices.x(i), features * sizeof(float));
    const auto row = [&p](int64_t e, int64_t n) {
        return static_cast<const scalar_t*>(p.weight) + p.offsets[e] + n * p.weight_row_stride;
    };
    const int64_t grain = rows_of_chunk<scalar_t>(features, p.out_features, threads, kExpertChunkBytes);
    parallel_for(p.out_features, grain, choices.size() * features * p.out_features, threads,
                 [&](int64_t first, int64_t last) {
                     choices.collect(first, last, [&](int64_t e, int64_t next, const auto& store) {
                         const int64_t begin = choices.begin(e), count = choices.begin(e + 1) - begin;
                         const scalar_t* after = next < p.num_experts ? row(next, first) : nullptr;
                         const LinearOperands<scalar_t> operands{x + begin * features, features, row(e, 0),
                                                                 p.weight_row_stride,  features, after};
                         multiply_rows(operands, count, first, last,
                                       [&](int64_t m, int64_t n, float total) { store(begin + m, n, total); });
                     });
                 });
}

}  // namespace

void expert_linear_blocks(const ExpertLinearParams& p, int threads);

void expert_linear(const ExpertLinearParams& p, int threads) {
    if (is_blocks(p.weight_dtype)) return expert_linear_blocks(p, threads);
    SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
