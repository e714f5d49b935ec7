// A thread takes some tokens. Every order of operations depends on the number of experts alone.
#include "../params.h"
#include "buffer.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Whether a is chosen before b, which stands before it: NaN comes before all numbers, of equals the first.
inline bool beats(float a, float b) { return a > b || (a != a && b == b); }

// The best of `count` values that are not taken yet; there is one.
inline int64_t best(const float* values, const bool* taken, int64_t count) {
    int64_t found = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (found < 0 || beats(values[i], values[found]))) found = i;
    return found;
}

// scores: (E) in full vectors, and what a softmax of them is divided by.
inline void softmax(const float* logits, float* scores, int64_t count) {
    float max = logits[0], total = 0;
    for (int64_t e = 1; e < count; e++)
        if (logits[e] > max || max != max) max = logits[e];
    for (int64_t e = 0; e < count; e += kLanes) {
        const int64_t lanes = min(kLanes, count - e);
        store_n(scores + e, exp(sub(load_n(logits + e, lanes), broadcast(max))), lanes);
    }
    for (int64_t e = 0; e < count; e++) total += scores[e];
    for (int64_t e = 0; e < count; e++) scores[e] /= total;
}
inline void sigmoid(const float* logits, float* scores, int64_t count) {
    const Vec one = broadcast(1.f);
    for (int64_t e = 0; e < count; e += kLanes) {
        const int64_t lanes = min(kLanes, count - e);
        store_n(scores + e, div(one, add(one, exp(sub(zero(), load_n(logits + e, lanes))))), lanes);
    }
}

// Takes the experts of all groups but the best.
inline void leave_out_groups(const SelectExpertsParams& p, const float* choice, bool* taken) {
    const int64_t size = p.num_experts / p.groups;
    float best_two[kMaxExperts];
    bool kept[kMaxExperts] = {};
    for (int64_t g = 0; g < p.groups; g++) {
        const float* group = choice + g * size;
        bool seen[kMaxExperts] = {};
        const int64_t first = best(group, seen, size);
        seen[first] = true;
        best_two[g] = group[first] + group[best(group, seen, size)];
    }
    for (int64_t i = 0; i < p.top_k_groups; i++) kept[best(best_two, kept, p.groups)] = true;
    for (int64_t e = 0; e < p.num_experts; e++) taken[e] = !kept[e / size];
}

inline void select_row(const SelectExpertsParams& p, int64_t row) {
    const int64_t count = p.num_experts;
    const float* logits = p.logits + row * p.logits_row_stride;
    float* weights = p.weights + row * p.top_k;
    int32_t* experts = p.experts + row * p.top_k;
    float scores[kMaxExperts], choice[kMaxExperts];
    bool taken[kMaxExperts] = {};
    p.score == kSigmoid ? sigmoid(logits, scores, count) : softmax(logits, scores, count);
    for (int64_t e = 0; e < count; e++) choice[e] = p.bias ? scores[e] + p.bias[e] : scores[e];
    if (p.groups > 1) leave_out_groups(p, choice, taken);
    float total = 0;
    for (int64_t i = 0; i < p.top_k; i++) {
        const int64_t expert = best(choice, taken, count);
        taken[expert] = true;
        experts[i] = static_cast<int32_t>(expert);
        weights[i] = scores[expert];
        total += scores[expert];
    }
    for (int64_t i = 0; i < p.top_k; i++) {
        if (p.normalize) weights[i] /= total + p.epsilon;
        weights[i] *= p.scale;
    }
}

}  // namespace

void select_experts(const SelectExpertsParams& p, int threads) {
    const int64_t work = p.rows * p.num_experts * (p.top_k + 16);
    parallel_for(p.rows, divide_up(p.rows, 4 * threads), work, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) select_row(p, row);
    });
}

}  // namespace speculative_mamba::SM_ISA
