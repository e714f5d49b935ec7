// One token from weights, by an exponential race: token i arrives after E_i / w_i, E_i exponential from the noise of
// (position, token), and the first wins. That is the Gumbel-max draw: with the same noise, laws that are alike give the
// same token more often than not, which is what couples draft and target.
#pragma once

#include <cmath>

#include "../philox.h"
#include "law.h"

namespace speculative_mamba::SM_ISA {
namespace {

struct Race {
    double best = __builtin_inf();
    int64_t winner = -1;

    void enter(int64_t token, double weight, uint32_t bits) {
        const double arrival = -std::log1p(-(bits + 0.5) * 0x1p-32) / weight;
        if (arrival < best || (arrival == best && token < winner)) best = arrival, winner = token;
    }
};

// Tokens 0 … count-1. -log(1 - v) >= v, so most tokens are out of the race before a logarithm is taken.
inline int64_t draw_dense(const float* weights, int64_t count, const Noise& noise) {
    Race race;
    constexpr int counters = 32;  // more than compilers unroll, so that they use vectors instead
    for (int64_t first = 0; first < count; first += 4 * counters) {
        uint32_t words[4][counters];
        noise.fill<counters>(words, static_cast<uint32_t>(first / 4));
        for (int64_t part = 0; part < counters / 4 && first + part * 16 < count; part++) {
            const int64_t start = first + part * 16, lanes = smaller(16, count - start);
            const uint32_t* bits = &words[part % 4][part / 4 * 16];
            float earliest[16];
            for (int l = 0; l < 16; l++) earliest[l] = static_cast<float>(bits[l] >> 8) * 0x1p-24f;
            const Vec limit = broadcast(static_cast<float>(race.best) * 1.000001f);
            if (race.winner >= 0 && !any_greater(mul(load_n(weights + start, lanes), limit), load(earliest))) continue;
            for (int64_t l = 0; l < lanes; l++)
                if (weights[start + l] > 0) race.enter(start + l, weights[start + l], bits[l]);
        }
    }
    return race.winner;
}

inline int64_t draw(const Law& law, const Noise& noise) {
    if (!law.ids) return draw_dense(law.weights, law.count, noise);
    Race race;
    for (int64_t i = 0; i < law.count; i++)
        if (law.weights[i] > 0) race.enter(law.ids[i], law.weights[i], noise.bits(law.ids[i]));
    return race.winner;
}

}  // namespace
}  // namespace speculative_mamba::SM_ISA
