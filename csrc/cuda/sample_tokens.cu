// A block takes a row.
#include "draw.cuh"

namespace speculative_mamba::cuda {
namespace {

__device__ __forceinline__ Verdict take(const SampleTokensParams& p, const Memory& m, int64_t row, int& token) {
    const float* logits = p.logits + row * p.logits_batch_stride;
    const bool* seen = p.seen + row * p.vocabulary;
    const int64_t* recent = p.recent + row * p.recent_tokens;
    const int vocabulary = static_cast<int>(p.vocabulary);
    Law law;
    law.logits = {logits, vocabulary, p.filters.repetition_penalty, seen, recent, p.recent_tokens};
    const Verdict verdict = law.make(m, p.filters);
    if (verdict != Verdict::ok) return verdict;
    const Noise noise = noise_of(p.keys + 2 * row, load_raw(p.positions + row), static_cast<Purpose>(p.purpose));
    const Choice choice = choose(m, law, noise);
    token = choice.token;
    if (!p.laws) return verdict;
    float* out = p.laws + row * p.laws_batch_stride;
    for_each_logit(law.logits, vocabulary,
                   [&](int i, float logit) { store(out + i, law.weight(i, logit) * choice.scale); });
    return verdict;
}

__global__ void __launch_bounds__(kMaxThreads, 1) sample(SampleTokensParams p) {
    SM_BLOCK_MEMORY(memory);
    wait_for_previous();
    const int64_t row = blockIdx.x;
    int token = 0;
    const bool active = !p.active || load_raw(p.active + row);
    const Verdict verdict = active ? take(p, memory, row, token) : Verdict::ok;
    if (threadIdx.x != 0) return;
    store_raw(p.tokens + row, static_cast<int64_t>(token));
    store_raw(p.verdicts + row, static_cast<int32_t>(verdict));
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, cudaStream_t stream) {
    launch(sample, dim3(static_cast<unsigned>(p.batch)), threads_for(p.vocabulary), stream, p);
}

}  // namespace speculative_mamba::cuda
