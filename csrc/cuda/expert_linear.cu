// A block has four rows of one expert's matrix, a warp one of them for all tokens that have chosen the expert.
// Weighted, the products are summed by a second kernel, in the order in which a token has chosen.
#include <algorithm>

#include "block.cuh"
#include "kernels.h"
#include "linear_by_fma.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / kWarp;
constexpr int kMaxTokens = 8;  // at a time

// Row n of an expert's matrix for the choices that lanes at, at+1, … hold.
template <int M, typename Act, typename Weight>
__device__ __forceinline__ void multiply_choices(const ExpertLinearParams& p, const Weight* weight, int64_t n, int held,
                                                 int at) {
    const int top_k = static_cast<int>(p.top_k);
    int choice[M];
    const Act* x[M];
#pragma unroll
    for (int m = 0; m < M; m++) {
        choice[m] = __shfl_sync(kAllLanes, held, at + m, kWarp);
        const int token = choice[m] / top_k, input = p.inputs == 1 ? 0 : choice[m] - token * top_k;
        x[m] = reinterpret_cast<const Act*>(p.x) + token * p.x_token_stride + input * p.x_input_stride;
    }
    float totals[M];
    multiply_row<M>(weight, x, p.in_features, totals);
    if (threadIdx.x % kWarp != 0) return;
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int64_t to = choice[m] * p.out_features + n;
        p.expert_weights ? store(p.scratch + to, totals[m]) : store(reinterpret_cast<Act*>(p.y) + to, totals[m]);
    }
}

// Blocks are of an expert each, or where choices are fewer, of a choice: then the first choice of an expert serves all.
template <typename Act, typename Weight>
__global__ void __launch_bounds__(kThreads, 3) multiply(ExpertLinearParams p) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, choices = static_cast<int>(p.tokens * p.top_k);
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (n >= p.out_features) return;  // a whole warp
    wait_for_previous();
    const int y = static_cast<int>(blockIdx.y);
    const bool by_choice = choices < p.num_experts;
    const int expert = by_choice ? load_raw(p.experts + y) : y;
    const Weight* weight =
        static_cast<const Weight*>(p.weight) + load_raw(p.offsets + expert) + n * p.weight_row_stride;
    int held = 0, count = 0;  // choices that wait to be multiplied: lane i holds the i-th
    for (int first = 0; first < choices; first += kWarp) {
        const bool hit = first + lane < choices && load_raw(p.experts + first + lane) == expert;
        auto hits = static_cast<uint32_t>(warp_reduce<kWarp>(hit ? uint64_t{1} << lane : uint64_t{0}, Or{}));
        for (; hits; hits &= hits - 1) {
            const int choice = first + lowest_bit(hits);
            if (by_choice && choice < y) return;
            if (lane == count) held = choice;
            if (++count < kMaxTokens) continue;
            multiply_choices<kMaxTokens, Act>(p, weight, n, held, 0);
            count = 0;
        }
    }
    int at = 0;
    if (count & 4) multiply_choices<4, Act>(p, weight, n, held, at), at += 4;
    if (count & 2) multiply_choices<2, Act>(p, weight, n, held, at), at += 2;
    if (count & 1) multiply_choices<1, Act>(p, weight, n, held, at);
}

// A thread has an output of a token.
template <typename Act>
__global__ void __launch_bounds__(kThreads) combine(ExpertLinearParams p) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, m = blockIdx.y;
    if (n >= p.out_features) return;
    wait_for_previous();
    float total = 0.f;
    for (int64_t i = m * p.top_k; i < (m + 1) * p.top_k; i++)
        total += load(p.expert_weights + i) * load(p.scratch + i * p.out_features + n);
    store(reinterpret_cast<Act*>(p.y) + m * p.out_features + n, total);
}

template <typename Act, typename Weight>
void run(const ExpertLinearParams& p, cudaStream_t stream) {
    const auto choices = static_cast<unsigned>(std::min(p.tokens * p.top_k, p.num_experts));
    launch(multiply<Act, Weight>, dim3(blocks_for(p.out_features, kRows), choices), dim3(kThreads), stream, p);
    if (!p.expert_weights) return;
    const dim3 blocks(blocks_for(p.out_features, kThreads), static_cast<unsigned>(p.tokens));
    launch(combine<Act>, blocks, dim3(kThreads), stream, p);
}

template <typename Act>
void with_activations(const ExpertLinearParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void expert_linear(const ExpertLinearParams& p, cudaStream_t stream) {
    if (p.tokens * p.top_k > INT32_MAX) throw std::invalid_argument("expert_linear: too many tokens for CUDA");
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda

int64_t speculative_mamba::scratch_bytes(const ExpertLinearParams& p) {
    return p.expert_weights ? p.tokens * p.top_k * p.out_features * static_cast<int64_t>(sizeof(float)) : 0;
}
