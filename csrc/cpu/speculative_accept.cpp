// Walks each row's window until its draft is first refused; positions behind that are never looked at.
#include "draw.h"

namespace speculative_mamba::SM_ISA {
namespace {

struct Outcome {
    Verdict verdict;
    int64_t accepted, next;  // or, for a verdict other than ok, accepted is the position
};

// What the target has and the draft lacks: max(p - q, 0), on the tokens of positive p. Keeps the entries' order.
Verdict residual(const Law& law, const float* q, int64_t certain, float* weights, double excess) {
    double total = 0;
    for (int64_t i = 0; i < law.count; i++) {
        const int64_t token = law.ids ? law.ids[i] : i;
        const float p = law.weights[i] * law.scale, other = q ? q[token] : token == certain ? 1.f : 0.f;
        const float rest = p > 0 ? p - other : 0.f;
        weights[i] = rest > 0 || rest != rest ? rest : 0.f;
        total += weights[i];
    }
    if (total > 0 && total < __builtin_inf()) return Verdict::ok;
    // The laws' own rounding can leave a refused token's excess uncovered; the target's law is the limit then.
    if (total == 0 && excess < kRounding) {
        std::memcpy(weights, law.weights, law.count * sizeof(float));
        return Verdict::ok;
    }
    return Verdict::bad_residual;
}

Outcome row(const SpeculativeAcceptParams& p, int64_t b) {
    const Scratch s = scratch(p.vocabulary);
    const int64_t* drafted = p.drafted + b * (p.tokens - 1);
    const bool greedy = p.filters.temperature == 0;
    const int64_t end = p.limits ? smaller(p.limits[b], p.tokens - 1) : p.tokens - 1;
    for (int64_t t = 0; t <= end; t++) {
        const float* logits = penalised(p.logits + b * p.logits_batch_stride + t * p.logits_token_stride, p.vocabulary,
                                        p.filters.repetition_penalty, p.seen + b * p.vocabulary, drafted, t, s);
        Law law;
        const Verdict verdict = make_law(logits, p.vocabulary, p.filters, s, law);
        if (verdict != Verdict::ok) return {verdict, t, 0};
        Noise noise{static_cast<uint64_t>(p.keys[2 * b]), static_cast<uint32_t>(p.keys[2 * b + 1]),
                    static_cast<uint32_t>(p.positions[b] + t), Purpose::token};
        const bool last = t == end;
        if (last || greedy || p.coupled) {
            const int64_t choice = greedy ? law.ids[0] : draw(law, noise);
            if (last || choice != drafted[t]) return {Verdict::ok, t, choice};
            continue;
        }
        const float* q = p.laws ? p.laws + b * p.laws_batch_stride + t * p.laws_token_stride : nullptr;
        const double of_draft = q ? q[drafted[t]] : 1.0, of_target = law.probability(drafted[t]);
        if (!(of_draft > 0 && of_draft < __builtin_inf())) return {Verdict::bad_draft_law, t, 0};
        noise.purpose = Purpose::test;
        if (noise.uniform() * of_draft < of_target) continue;
        noise.purpose = Purpose::token;
        const Verdict rest = residual(law, q, drafted[t], s.logits, of_draft - of_target);
        if (rest != Verdict::ok) return {rest, t, 0};
        law.weights = s.logits;
        return {Verdict::ok, t, draw(law, noise)};
    }
    return {Verdict::ok, 0, 0};
}

}  // namespace

void speculative_accept(const SpeculativeAcceptParams& p, int threads) {
    parallel_for(p.batch, divide_up(p.batch, 8 * threads), p.batch * p.tokens * p.vocabulary * 16, threads,
                 [&](int64_t first, int64_t last) {
                     for (int64_t b = first; b < last; b++) {
                         const bool active = !p.active || p.active[b];
                         const Outcome o = active ? row(p, b) : Outcome{Verdict::ok, 0, 0};
                         p.verdicts[b] = static_cast<int32_t>(o.verdict);
                         p.accepted[b] = static_cast<int32_t>(o.accepted);
                         p.next[b] = o.next;
                     }
                 });
}

}  // namespace speculative_mamba::SM_ISA
