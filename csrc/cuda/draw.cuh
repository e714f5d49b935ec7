// One token from weights, by an exponential race, as in cpu/draw.h: token i arrives after E / w, E exponential from the
// noise of the token, and the first wins; of equals the lowest id. Arrivals are float32: rounded as the weights are.
#pragma once

#include "../philox.h"
#include "law.cuh"
#include "shortlist.cuh"

namespace speculative_mamba::cuda {
namespace {

// key (2): seed, stream.
__device__ __forceinline__ Noise noise_of(const int64_t* key, int64_t position, Purpose purpose) {
    return {static_cast<uint64_t>(load_raw(key)), static_cast<uint32_t>(load_raw(key + 1)),
            static_cast<uint32_t>(position), purpose};
}

struct Race {
    float best = HUGE_VALF;
    int winner = -1;

    __device__ void enter(int token, float weight, uint32_t bits) {
        // -log(1 - v) >= v: most tokens are out of the race before a logarithm is taken.
        if (static_cast<float>(bits >> 8) * 0x1p-24f > best * weight * 1.000001f) return;
        const float arrival = exponential(bits) / weight;
        if (arrival < best || winner < 0) best = arrival, winner = token;
    }
    // -log(1 - v), v = (bits + 0.5) / 2³², accurate at both ends.
    __device__ static float exponential(uint32_t bits) {
        const bool low = bits < 0x80000000u;
        const float rest = (static_cast<float>(low ? bits : ~bits) + 0.5f) * 0x1p-32f;
        return low ? -log1pf(-rest) : -logf(rest);
    }
};

__device__ __forceinline__ int winner_of(const Memory& m, const Race& race) {
    uint32_t bits;
    memcpy(&bits, &race.best, sizeof bits);
    const uint64_t mine = race.winner < 0 ? ~uint64_t{0} : uint64_t{bits} << 32 | static_cast<unsigned>(race.winner);
    return static_cast<int>(of_block(m, mine, smaller) & 0xffffffffu);
}

// A token of those that measure(token, weight) is positive for; of a law it is asked for once. Where there is none the
// result means nothing.
template <typename Measure>
__device__ __forceinline__ int draw(const Memory& m, const Shortlist& law, const Noise& noise, Measure measure) {
    Race race;
    law.for_mine([&](int token, float weight) {
        const float mine = measure(token, weight);
        if (mine > 0.f) race.enter(token, mine, noise.bits(static_cast<uint32_t>(token)));
    });
    return winner_of(m, race);
}
template <typename Measure>
__device__ __forceinline__ int draw(const Memory& m, const Law& law, const Noise& noise, Measure measure) {
    Race race;
    // A thread takes four tokens at a time, those that share a counter.
    for (int counter = static_cast<int>(threadIdx.x);; counter += static_cast<int>(blockDim.x)) {
        const int first = counter / 16 * 64 + counter % 16;
        if (first >= law.logits.vocabulary) break;
        float weights[4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = first + 16 * i;
            weights[i] = token < law.logits.vocabulary ? measure(token, law.weight(token)) : 0.f;
            any |= weights[i] > 0.f;
        }
        if (!any) continue;
        uint32_t words[4][1];
        noise.fill<1>(words, static_cast<uint32_t>(counter));
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (weights[i] > 0.f) race.enter(first + 16 * i, weights[i], words[i][0]);
    }
    return winner_of(m, race);
}
template <typename Law>
__device__ __forceinline__ int draw(const Memory& m, const Law& law, const Noise& noise) {
    return draw(m, law, noise, [](int, float weight) { return weight; });
}

}  // namespace
}  // namespace speculative_mamba::cuda
