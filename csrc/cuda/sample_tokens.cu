// A survey of all logits, then a block for each row; greedy decoding needs a warp.
#include "kernels.h"
#include "spread.cuh"

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

__global__ void __launch_bounds__(kMaxThreads, 1) sample_few(SampleTokensParams p, int most) {
    SM_BLOCK_MEMORY(memory);
    SM_SHORTLIST(few);
    wait_for_previous();
    const int64_t row = blockIdx.x;
    const Position position = position_of(p, row, 0);
    const Noise noise = noise_at(p, row, 0);
    const bool active = is_active(p, row);
    Law law;
    const Verdict verdict = law.begin(memory, position, p.filters);
    int token = 0;
    if (active && verdict == Verdict::ok) {
        few.make(memory, law, groups_of(position), p.filters, most);
        token = draw(memory, few, noise);
        if (position.law)
            few.for_mine([&](int mine, float weight) { store(position.law + mine, weight * few.scale()); });
    }
    if (threadIdx.x == 0) answer(p, row, token, active ? verdict : Verdict::ok);
}

__global__ void __launch_bounds__(kChunkThreads, 2) sample_many(SampleTokensParams p) {
    SM_BLOCK_SUMS(memory);
    wait_for_previous();
    const int64_t row = blockIdx.y;
    const Position position = position_of(p, row, 0);
    const bool active = is_active(p, row);
    const Mine mine(position.logits);
    Law law;
    const Verdict verdict = finish(memory, position, p.filters, law);
    int token = 0;
    if (active && verdict == Verdict::ok) {
        const Chosen chosen = chosen_of(memory, position);
        token = chosen.token;
        mine.for_each([&](int, int id, float logit) {
            if (position.law && id < law.logits.vocabulary)
                store(position.law + id, law.weight(id, logit) * chosen.scale);
        });
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) answer(p, row, token, active ? verdict : Verdict::ok);
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, cudaStream_t stream) {
    const dim3 rows(static_cast<unsigned>(p.batch));
    if (p.filters.temperature == 0.f) {
        launch_survey<true>(p, 1, stream);
        return launch(take_likeliest, rows, dim3(kWarp), stream, p);
    }
    launch_survey<false>(p, 1, stream);
    if (const int most = shortlist_for(p.vocabulary, p.filters))
        return launch(sample_few, rows, threads_for(p.vocabulary), stream, p, most);
    launch_contest(p, 1, stream);
    dim3 chunks = chunks_of_all(p, 1);
    if (!p.laws) chunks.x = 1;
    launch(sample_many, chunks, dim3(kChunkThreads), stream, p);
}

}  // namespace speculative_mamba::cuda

int64_t speculative_mamba::scratch_bytes(const SampleTokensParams& p) {
    return p.batch * cuda::scratch_of(p.vocabulary) * static_cast<int64_t>(sizeof(uint64_t));
}
