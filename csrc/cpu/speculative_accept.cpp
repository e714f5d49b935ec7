// Walks each row's window until its draft is first refused; positions behind that are never looked at.
#include "gumbel_argmax.h"

namespace speculative_mamba::SM_ISA {
namespace {

struct Outcome {
    RowStatus status;
    int64_t accepted, next_token;  // or, for a status other than ok, accepted is the position
};

// What the target has and the draft lacks: max(p - q, 0), on the tokens of positive p. Keeps the entries' order.
RowStatus residual(const Probs& target, const float* q, int64_t certain, float* weights, double excess) {
    double total = 0;
    for (int64_t i = 0; i < target.count; i++) {
        const int64_t token = target.ids ? target.ids[i] : i;
        const float p = target.weights[i] * target.scale, other = q ? q[token] : token == certain ? 1.f : 0.f;
        const float rest = p > 0 ? p - other : 0.f;
        weights[i] = rest > 0 || rest != rest ? rest : 0.f;
        total += weights[i];
    }
    if (total > 0 && total < __builtin_inf()) return RowStatus::ok;
    // Rounding alone can leave a refused token's excess uncovered; the target's probabilities are the limit then.
    if (total == 0 && excess < kRounding) {
        std::memcpy(weights, target.weights, target.count * sizeof(float));
        return RowStatus::ok;
    }
    return RowStatus::bad_residual;
}

Outcome decide(const SpeculativeAcceptParams& p, int64_t b) {
    const Scratch s = scratch(p.vocabulary);
    const RowSampling row(p.sampling, b);
    const int64_t lookahead = p.tokens - 1, counted = p.draft_stride - lookahead;
    const int64_t* text = p.draft_tokens + b * p.draft_stride;
    const int64_t* drafted = text + counted;
    const int64_t end = p.num_draft_tokens ? min(p.num_draft_tokens[b], lookahead) : lookahead;
    for (int64_t t = 0; t <= end; t++) {
        if (t > 0 && p.is_stop && p.is_stop[b * p.vocabulary + drafted[t - 1]]) return {RowStatus::ok, t, 0};
        const float* logits =
            adjusted(p.logits + b * p.logits_batch_stride + t * p.logits_token_stride, p.vocabulary, row,
                     p.prompt_mask + b * p.vocabulary, p.output_counts + b * p.vocabulary, text, counted + t, s);
        Probs target;
        const RowStatus status = make_probs(logits, p.vocabulary, row, s, target);
        if (status != RowStatus::ok) return {status, t, 0};
        if (p.target_probs) target.store(p.target_probs + b * p.target_probs_batch_stride, p.vocabulary);
        Noise noise{static_cast<uint64_t>(p.rng_keys[2 * b]), static_cast<uint32_t>(p.rng_keys[2 * b + 1]),
                    static_cast<uint32_t>(p.positions[b] + t), static_cast<Purpose>(p.purpose)};
        const bool last = t == end;
        if (last || row.greedy() || p.coupled) {
            const int64_t choice = row.greedy() ? target.ids[0] : gumbel_argmax(target, noise);
            if (last || choice != drafted[t]) return {RowStatus::ok, t, choice};
            continue;
        }
        const float* q =
            p.draft_probs ? p.draft_probs + b * p.draft_probs_batch_stride + t * p.draft_probs_token_stride : nullptr;
        const double of_draft = q ? q[drafted[t]] : 1.0, of_target = target[drafted[t]];
        if (!(of_draft > 0 && of_draft < __builtin_inf())) return {RowStatus::bad_draft_probs, t, 0};
        noise.purpose = Purpose::test;
        if (noise.uniform() * of_draft < of_target) continue;
        noise.purpose = Purpose::token;
        const RowStatus rest = residual(target, q, drafted[t], s.logits, of_draft - of_target);
        if (rest != RowStatus::ok) return {rest, t, 0};
        target.weights = s.logits;
        return {RowStatus::ok, t, gumbel_argmax(target, noise)};
    }
    return {RowStatus::ok, 0, 0};
}

}  // namespace

void speculative_accept(const SpeculativeAcceptParams& p, int threads) {
    parallel_for(p.batch, divide_up(p.batch, 8 * threads), p.batch * p.tokens * p.vocabulary * 16, threads,
                 [&](int64_t first, int64_t last) {
                     for (int64_t b = first; b < last; b++) {
                         const bool active = !p.active || p.active[b];
                         const Outcome o = active ? decide(p, b) : Outcome{RowStatus::ok, 0, 0};
                         p.row_status[b] = static_cast<int32_t>(o.status);
                         p.accepted[b] = static_cast<int32_t>(o.accepted);
                         p.next_token[b] = o.next_token;
                     }
                 });
}

}  // namespace speculative_mamba::SM_ISA
