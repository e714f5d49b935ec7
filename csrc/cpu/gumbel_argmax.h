// One token from weights: the argmax of log w plus Gumbel noise, computed as an exponential argmax. Token i arrives
// after E_i / w_i, E_i exponential from the noise of (position, token), and the first wins. With the same noise,
// probabilities that are alike give the same token more often than not, which is what couples draft and target.
#pragma once

#include <cmath>

#include "../philox.h"
#include "sampling.h"

namespace speculative_mamba::SM_ISA {
namespace {

struct GumbelArgmax {
    double best = __builtin_inf();
    int64_t winner = -1;

    void enter(int64_t token, double weight, uint32_t bits) {
        const double arrival = -std::log1p(-(bits + 0.5) * 0x1p-32) / weight;
        if (arrival < best || (arrival == best && token < winner)) best = arrival, winner = token;
    }
};

// Tokens 0 … count-1. -log(1 - v) >= v, so most tokens are out of the race before a logarithm is taken.
inline int64_t gumbel_argmax_dense(const float* weights, int64_t count, const Noise& noise) {
    GumbelArgmax argmax;
    constexpr int counters = 32;  // more than compilers unroll, so that they use vectors instead
    for (int64_t first = 0; first < count; first += 4 * counters) {
        uint32_t words[4][counters];
        noise.fill<counters>(words, static_cast<uint32_t>(first / 4));
        for (int64_t part = 0; part < counters / 4 && first + part * 16 < count; part++) {
            const int64_t start = first + part * 16, lanes = min(16, count - start);
            const uint32_t* bits = &words[part % 4][part / 4 * 16];
            float earliest[16];
            for (int l = 0; l < 16; l++) earliest[l] = static_cast<float>(bits[l] >> 8) * 0x1p-24f;
            const Vec limit = broadcast(static_cast<float>(argmax.best) * 1.000001f);
            if (argmax.winner >= 0 && !any_greater(mul(load_n(weights + start, lanes), limit), load(earliest)))
                continue;
            for (int64_t l = 0; l < lanes; l++)
                if (weights[start + l] > 0) argmax.enter(start + l, weights[start + l], bits[l]);
        }
    }
    return argmax.winner;
}

inline int64_t gumbel_argmax(const Probs& probs, const Noise& noise) {
    if (!probs.ids) return gumbel_argmax_dense(probs.weights, probs.count, noise);
    GumbelArgmax argmax;
    for (int64_t i = 0; i < probs.count; i++)
        if (probs.weights[i] > 0) argmax.enter(probs.ids[i], probs.weights[i], noise.bits(probs.ids[i]));
    return argmax.winner;
}

}  // namespace
}  // namespace speculative_mamba::SM_ISA
