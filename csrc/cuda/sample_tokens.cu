// A survey of all logits, then a block for each row; greedy decoding needs a warp.
#include "draw.cuh"

namespace speculative_mamba::cuda {
namespace {

__device__ __forceinline__ void answer(const SampleTokensParams& p, int64_t row, int token, Verdict verdict) {
    store_raw(p.tokens + row, static_cast<int64_t>(token));
    store_raw(p.verdicts + row, static_cast<int32_t>(verdict));
}

__global__ void __launch_bounds__(kWarp) take_likeliest(SampleTokensParams p) {
    wait_for_previous();
    const int64_t row = blockIdx.x;
    const bool active = is_active(p, row);
    const Position position = position_of(p, row, 0);
    const Leader leader = leader_of(position);
    if (threadIdx.x != 0) return;
    if (!active) return answer(p, row, 0, Verdict::ok);
    const bool ok = leader.verdict == Verdict::ok;
    if (ok && position.law) store(position.law + leader.token, 1.f);
    answer(p, row, ok ? leader.token : 0, leader.verdict);
}

template <typename Law>
__device__ __forceinline__ int take(const Memory& m, const Position& position, const Noise& noise, const Law& law) {
    if (position.law) {
        const float scale = law.scale(m);
        law.for_mine([&](int token, float weight) { store(position.law + token, weight * scale); });
    }
    return draw(m, law, noise);
}

__global__ void __launch_bounds__(kMaxThreads, 1) sample(SampleTokensParams p, int shortlist) {
    SM_BLOCK_MEMORY(memory);
    SM_LIST_MEMORY(list_memory);
    wait_for_previous();
    const int64_t row = blockIdx.x;
    const bool active = is_active(p, row);
    const Noise noise = noise_of(p.keys + 2 * row, load_raw(p.positions + row), static_cast<Purpose>(p.purpose));
    const Position position = position_of(p, row, 0);
    int token = 0;
    Verdict verdict = Verdict::ok;
    if (active) {
        Shortlist listed{list_memory};
        if (shortlist && listed.make(memory, position, p.filters, shortlist, verdict)) {
            if (verdict == Verdict::ok) token = take(memory, position, noise, listed);
        } else {
            Law law;
            law.logits = position.logits;
            verdict = law.make(memory, p.filters);
            if (verdict == Verdict::ok) token = take(memory, position, noise, law);
        }
    }
    if (threadIdx.x == 0) answer(p, row, token, verdict);
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, cudaStream_t stream) {
    const dim3 rows(static_cast<unsigned>(p.batch));
    if (p.filters.temperature == 0.f) {
        launch_survey<true>(p, 1, stream);
        return launch(take_likeliest, rows, dim3(kWarp), stream, p);
    }
    const int shortlist = shortlist_for(p.vocabulary, p.filters);
    if (shortlist) launch_survey<false>(p, 1, stream);
    launch(sample, rows, threads_for(p.vocabulary), stream, p, shortlist);
}

}  // namespace speculative_mamba::cuda
