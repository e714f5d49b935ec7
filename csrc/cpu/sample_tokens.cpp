// One token per row, and the law it was drawn from.
#include "draw.h"

namespace speculative_mamba::SM_ISA {
namespace {

Verdict row(const SampleTokensParams& p, int64_t b) {
    const Scratch s = scratch(p.vocabulary);
    const float* logits = penalised(p.logits + b * p.logits_batch_stride, p.vocabulary, p.filters.repetition_penalty,
                                    p.seen + b * p.vocabulary, p.recent + b * p.recent_tokens, p.recent_tokens, s);
    Law law;
    const Verdict verdict = make_law(logits, p.vocabulary, p.filters, s, law);
    if (verdict != Verdict::ok) return verdict;
    if (float* out = p.laws ? p.laws + b * p.laws_batch_stride : nullptr) {
        if (law.ids) {
            std::memset(out, 0, p.vocabulary * sizeof(float));
            for (int64_t i = 0; i < law.count; i++) out[law.ids[i]] = law.weights[i] * law.scale;
        } else {
            for (int64_t i = 0; i < law.count; i++) out[i] = law.weights[i] * law.scale;
        }
    }
    const Noise noise{static_cast<uint64_t>(p.keys[2 * b]), static_cast<uint32_t>(p.keys[2 * b + 1]),
                      static_cast<uint32_t>(p.positions[b]), static_cast<Purpose>(p.purpose)};
    p.tokens[b] = p.filters.temperature == 0 ? law.ids[0] : draw(law, noise);
    return Verdict::ok;
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, int threads) {
    parallel_for(p.batch, divide_up(p.batch, 8 * threads), p.batch * p.vocabulary * 16, threads,
                 [&](int64_t first, int64_t last) {
                     for (int64_t b = first; b < last; b++) {
                         p.tokens[b] = 0;
                         const bool active = !p.active || p.active[b];
                         p.verdicts[b] = static_cast<int32_t>(active ? row(p, b) : Verdict::ok);
                     }
                 });
}

}  // namespace speculative_mamba::SM_ISA
