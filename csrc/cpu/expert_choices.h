// Choices, each a token and one of its experts, sorted by expert. A thread takes some rows of every chosen matrix, one
// expert after the other, so each matrix is read once, and a token's summands meet in the order of their experts.
#pragma once

#include "../params.h"
#include "buffer.h"
#include "parallel_for.h"

namespace speculative_mamba::SM_ISA {

// Of each expert's matrix a thread reads this much at a time: every change to another costs a wait for memory.
constexpr int64_t kExpertChunkBytes = 128 * 1024;

class SortedChoices {
 public:
    explicit SortedChoices(const ExpertLinearParams& p) : p_(p) {
        thread_local Buffer begins, choices;
        begin_ = begins.reserve<int64_t>(p.num_experts + 2);  // at first one further, where it counts
        choice_ = choices.reserve<int64_t>(size());
        for (int64_t e = 0; e < p.num_experts + 2; e++) begin_[e] = 0;
        for (int64_t i = 0; i < size(); i++) begin_[p.experts[i] + 2]++;
        for (int64_t e = 0; e < p.num_experts; e++) begin_[e + 2] += begin_[e + 1];
        for (int64_t i = 0; i < size(); i++) choice_[begin_[p.experts[i] + 1]++] = i;
    }

    int64_t size() const { return p_.tokens * p_.top_k; }
    // Of expert e: choices begin(e) … begin(e+1)-1.
    int64_t begin(int64_t e) const { return begin_[e]; }

    // The row of x of a choice.
    const float* x(int64_t i) const {
        const int64_t input = p_.inputs == 1 ? 0 : choice_[i] % p_.top_k;
        return p_.x + choice_[i] / p_.top_k * p_.x_token_stride + input * p_.x_input_stride;
    }

    // Columns first … last-1 of y. multiply(e, next, store) calls store(i, n, product) for each choice i of expert e
    // and each of these columns; next is the expert that comes then, or the number of experts.
    template <typename Multiply>
    void collect(int64_t first, int64_t last, const Multiply& multiply) const {
        const int64_t outputs = p_.out_features;
        if (p_.expert_weights) {
            for (int64_t m = 0; m < p_.tokens; m++)
                for (int64_t n = first; n < last; n++) p_.y[m * outputs + n] = 0.f;
        }
        for (int64_t e = chosen_from(0), next; e < p_.num_experts; e = next) {
            next = chosen_from(e + 1);
            if (p_.expert_weights) {
                multiply(e, next, [&](int64_t i, int64_t n, float product) {
                    const int64_t choice = choice_[i];
                    p_.y[choice / p_.top_k * outputs + n] += p_.expert_weights[choice] * product;
                });
            } else {
                multiply(e, next,
                         [&](int64_t i, int64_t n, float product) { p_.y[choice_[i] * outputs + n] = product; });
            }
        }
    }

 private:
    int64_t chosen_from(int64_t e) const {
        while (e < p_.num_experts && begin_[e + 1] == begin_[e]) e++;
        return e;
    }

    const ExpertLinearParams& p_;
    int64_t *begin_, *choice_;  // (E+1); (M·k): m·k + j
};

}  // namespace speculative_mamba::SM_ISA
