// A first launch over all logits; then a block decides a position of a row as if all tokens before it stood; and a
// row's first rejection is its answer. What a row asks for is data: the launches are the same for every mix of rows.
#include "gumbel_argmax.cuh"
#include "kernels.h"

namespace speculative_mamba::cuda {
namespace {

// A decision is the token that is chosen, or this, or less by the status.
constexpr int64_t kStands = -1;
__device__ __forceinline__ int64_t decision(RowStatus status) { return kStands - static_cast<int64_t>(status); }

__device__ __forceinline__ void answer(const SpeculativeAcceptParams& p, int64_t row, int64_t t, int64_t decided) {
    const bool ok = decided >= 0;
    store_raw(p.accepted + row, static_cast<int32_t>(t));
    store_raw(p.next_token + row, ok ? decided : 0);
    store_raw(p.row_status + row, static_cast<int32_t>(ok ? 0 : kStands - decided));
}

// The draft's side of the test of a drafted token.
struct DraftProbs {
    const float* probs;  // (V); null: the draft was certain
    int drafted;

    __device__ float operator[](int token) const { return probs ? load(probs + token) : token == drafted ? 1.f : 0.f; }
};

// What becomes of a drafted token by its probabilities, after Leviathan et al. 2023.
__device__ __forceinline__ int64_t test(const TargetProbs& target, const DraftProbs& draft, Noise noise) {
    const double q = draft[draft.drafted], p = target[draft.drafted];
    if (!(q > 0 && q < HUGE_VAL)) return decision(RowStatus::bad_draft_probs);
    noise.purpose = Purpose::test;
    if (noise.uniform() * q < p) return kStands;
    noise.purpose = Purpose::token;
    // The residual max(p - q, 0), on the tokens of positive p.
    constexpr uint64_t kSome = 1, kBroken = 2;
    uint64_t residual_flags = 0;
    const int token = gumbel_argmax(target, noise, [&](int token, float weight) {
        const float of_target = weight * target.scale;
        const float residual = of_target > 0.f ? of_target - draft[token] : 0.f;
        residual_flags |= (residual > 0.f ? kSome : 0) | (residual < HUGE_VALF ? 0 : kBroken);
        return residual > 0.f ? residual : 0.f;
    });
    residual_flags = block_reduce(target.m, residual_flags, Or{});
    if (residual_flags == kSome) return token;
    // Rounding alone can leave a refused token's excess uncovered; the target's probabilities are the limit then.
    if (residual_flags != 0 || q - p >= kRounding) return decision(RowStatus::bad_residual);
    return gumbel_argmax(target, noise);
}

// The drafted token at a position of the window, which the last has none of.
__device__ __forceinline__ const int64_t* drafted_at(const SpeculativeAcceptParams& p, int64_t row, int64_t t) {
    return p.draft_tokens + (row + 1) * p.draft_stride - (p.tokens - 1) + t;
}
__device__ __forceinline__ bool follows_stop(const SpeculativeAcceptParams& p, int64_t row, int64_t t) {
    return p.is_stop && t > 0 && load_raw(p.is_stop + row * p.vocabulary + load_raw(drafted_at(p, row, t - 1)));
}

__device__ __forceinline__ int64_t decide_position(const SpeculativeAcceptParams& p, const BlockMemory& memory,
                                                   const Candidates& candidates, int64_t row, int64_t t) {
    const Position position(p, row, t);
    const RowSampling sampling(p.sampling, row);
    const bool has_drafted = t < lookahead_of(p, row);
    const int drafted = has_drafted ? static_cast<int>(load_raw(drafted_at(p, row, t))) : -1;
    const uint64_t likeliest = packed_max(memory, position);
    const float peak = logit_of(key_of(likeliest));
    const RowStatus status = status_of(peak, sampling.greedy());
    if (status != RowStatus::ok) return decision(status);
    auto store_prob = [&](int token, float prob) {
        store(p.target_probs + row * p.target_probs_batch_stride + token, prob);
    };
    if (sampling.greedy()) {
        if (p.target_probs && threadIdx.x == 0) store_prob(token_of(likeliest), 1.f);
        return token_of(likeliest) == drafted ? kStands : token_of(likeliest);
    }
    const TargetProbs target(memory, candidates, position, peak, sampling);
    if (p.target_probs) target.for_each([&](int token, float weight) { store_prob(token, weight * target.scale); });
    const Noise noise{static_cast<uint64_t>(load_raw(p.rng_keys + 2 * row)),
                      static_cast<uint32_t>(load_raw(p.rng_keys + 2 * row + 1)),
                      static_cast<uint32_t>(load_raw(p.positions + row) + t), static_cast<Purpose>(p.purpose)};
    if (has_drafted && !p.coupled) {
        const int64_t place = row * p.draft_probs_batch_stride + t * p.draft_probs_token_stride;
        return test(target, {p.draft_probs ? p.draft_probs + place : nullptr, drafted}, noise);
    }
    const int token = gumbel_argmax(target, noise);
    return token == drafted ? kStands : token;
}

__global__ void __launch_bounds__(kMaxThreads, 1) decide(SpeculativeAcceptParams p) {
    SM_BLOCK_MEMORY(memory);
    SM_CANDIDATES(candidates);
    wait_for_previous();
    const int64_t t = blockIdx.x, row = blockIdx.y;
    const bool wanted = is_active(p, row) && t <= lookahead_of(p, row) && !follows_stop(p, row, t);
    const int64_t decided = wanted ? decide_position(p, memory, candidates, row, t) : 0;
    if (threadIdx.x != 0) return;
    if (p.tokens == 1) return answer(p, row, 0, decided);
    store_raw(decisions_of(p, row) + t, decided);
}

// By a warp: the first position of a row whose drafted token does not stand.
__global__ void __launch_bounds__(kWarp) first_rejection(SpeculativeAcceptParams p) {
    wait_for_previous();
    const int64_t row = blockIdx.x;
    const int lane = static_cast<int>(threadIdx.x);
    for (int64_t t = lane;; t += kWarp) {
        const int64_t decided = t < p.tokens ? load_raw(decisions_of(p, row) + t) : kStands;
        const int first = warp_reduce<kWarp>(decided == kStands ? kWarp : lane, Min{});
        if (first == kWarp) continue;
        if (lane == first) answer(p, row, t, decided);
        return;
    }
}

}  // namespace

void speculative_accept(const SpeculativeAcceptParams& p, cudaStream_t stream) {
    const dim3 rows(static_cast<unsigned>(p.batch)), positions(static_cast<unsigned>(p.tokens), rows.x);
    launch_reduce_logits(p, stream);
    launch(decide, positions, threads_for(p.vocabulary), stream, p);
    if (p.tokens > 1) launch(first_rejection, rows, dim3(kWarp), stream, p);
}

}  // namespace speculative_mamba::cuda

// Words and a decision of every position, and its logits where rows can have penalties or bias.
int64_t speculative_mamba::scratch_bytes(const SpeculativeAcceptParams& p) {
    const bool adjusts = p.sampling.repetition_penalty || p.sampling.bias_capacity > 0;
    return p.batch * p.tokens * (8 * (cuda::words_of(p.vocabulary) + 1) + (adjusts ? 4 * p.vocabulary : 0));
}
