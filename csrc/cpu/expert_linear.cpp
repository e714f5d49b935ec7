// Choices, each a token and one of its experts, are sorted by expert. A thread takes some rows of every chosen matrix,
// one expert after the other, so each matrix is read once, and a token's summands meet in the order of their experts.
#include "../params.h"
#include "buffer.h"
#include "linear_rows.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Of each expert's matrix a thread reads this much at a time: every change to another costs a wait for memory.
constexpr int64_t kChunkBytes = 128 * 1024;

// Of expert e: choices begin[e] … begin[e+1]-1.
struct SortedChoices {
    const int64_t* begin;   // (E+1)
    const int64_t* choice;  // (M·k): m·k + j
    const float* x;         // (M·k, K)
};

SortedChoices sorted_choices(const ExpertLinearParams& p) {
    thread_local Buffer begins, choices, inputs;
    const int64_t count = p.tokens * p.top_k, row = p.in_features;
    int64_t* begin = begins.reserve<int64_t>(p.num_experts + 2);  // at first one further, where it counts
    int64_t* choice = choices.reserve<int64_t>(count);
    float* x = inputs.reserve<float>(count * row);
    for (int64_t e = 0; e < p.num_experts + 2; e++) begin[e] = 0;
    for (int64_t i = 0; i < count; i++) begin[p.experts[i] + 2]++;
    for (int64_t e = 0; e < p.num_experts; e++) begin[e + 2] += begin[e + 1];
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = begin[p.experts[i] + 1]++, input = p.inputs == 1 ? 0 : i % p.top_k;
        choice[at] = i;
        std::memcpy(x + at * row, p.x + i / p.top_k * p.x_token_stride + input * p.x_input_stride, row * sizeof(float));
    }
    return {begin, choice, x};
}

template <typename scalar_t>
void run(const ExpertLinearParams& p, int threads) {
    const SortedChoices sorted = sorted_choices(p);
    const int64_t grain = rows_of_chunk<scalar_t>(p.in_features, p.out_features, threads, kChunkBytes);
    const int64_t outputs = p.out_features;
    const int64_t work = p.tokens * p.top_k * p.in_features * outputs;
    parallel_for(outputs, grain, work, threads, [&](int64_t first, int64_t last) {
        if (p.expert_weights) {
            for (int64_t m = 0; m < p.tokens; m++)
                for (int64_t n = first; n < last; n++) p.y[m * outputs + n] = 0.f;
        }
        const auto next_chosen = [&](int64_t e) {
            while (e < p.num_experts && sorted.begin[e + 1] == sorted.begin[e]) e++;
            return e;
        };
        const auto matrix = [&](int64_t e) { return static_cast<const scalar_t*>(p.weight) + p.offsets[e]; };
        for (int64_t e = next_chosen(0), next; e < p.num_experts; e = next) {
            next = next_chosen(e + 1);
            const int64_t begin = sorted.begin[e], rows = sorted.begin[e + 1] - begin;
            const int64_t* choice = sorted.choice + begin;
            const LinearOperands<scalar_t> operands{
                sorted.x + begin * p.in_features,
                p.in_features,
                matrix(e),
                p.weight_row_stride,
                p.in_features,
                next < p.num_experts ? matrix(next) + first * p.weight_row_stride : nullptr};
            if (p.expert_weights) {
                multiply_rows(operands, rows, first, last, [&](int64_t m, int64_t n, float total) {
                    p.y[choice[m] / p.top_k * outputs + n] += p.expert_weights[choice[m]] * total;
                });
            } else {
                multiply_rows(operands, rows, first, last,
                              [&](int64_t m, int64_t n, float total) { p.y[choice[m] * outputs + n] = total; });
            }
        }
    });
}

}  // namespace

void expert_linear(const ExpertLinearParams& p, int threads) {
    SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
