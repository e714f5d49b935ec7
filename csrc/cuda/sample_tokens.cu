// A block takes a row.
#include "law.cuh"

namespace speculative_mamba::cuda {
namespace {

__global__ void __launch_bounds__(kMaxThreads) sample(SampleTokensParams p) {
    SM_LAW_MEMORY(memory);
    wait_for_previous();
    const int64_t row = blockIdx.x;
    const int vocabulary = static_cast<int>(p.vocabulary);
    const bool active = !p.active || load_raw(p.active + row);
    Verdict verdict = Verdict::ok;
    int token = 0;
    if (active) {
        Law law;
        law.logits = {p.logits + row * p.logits_batch_stride, vocabulary,
                      p.filters.repetition_penalty,           p.seen + row * p.vocabulary,
                      p.recent + row * p.recent_tokens,       p.recent_tokens};
        verdict = law.make(memory, p.filters);
        if (verdict == Verdict::ok) {
            const Noise noise{static_cast<uint64_t>(load_raw(p.keys + 2 * row)),
                              static_cast<uint32_t>(load_raw(p.keys + 2 * row + 1)),
                              static_cast<uint32_t>(load_raw(p.positions + row)), static_cast<Purpose>(p.purpose)};
            const Law::Choice choice = law.choose(memory, noise);
            token = choice.token;
            float* out = p.laws + row * p.laws_batch_stride;
            auto write = [&](int i, float logit) { store(out + i, law.weight(i, logit) * choice.scale); };
            if (p.laws) for_each_logit(law.logits, vocabulary, write);
        }
    }
    if (threadIdx.x != 0) return;
    store_raw(p.tokens + row, static_cast<int64_t>(token));
    store_raw(p.verdicts + row, static_cast<int32_t>(verdict));
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, cudaStream_t stream) {
    if (p.batch == 0) return;
    launch(sample, dim3(static_cast<unsigned>(p.batch)), threads_for(p.vocabulary), stream, p);
}

}  // namespace speculative_mamba::cuda
