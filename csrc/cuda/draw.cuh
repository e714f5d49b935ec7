// One token from weights, by an exponential race, as in cpu/draw.h: token i arrives after E / w, E exponential from the
// noise of the token, and the first wins; of equals the lowest id. Arrivals are float32: rounded as the weights are.
#pragma once

#include "../philox.h"
#include "shortlist.cuh"

namespace speculative_mamba::cuda {
namespace {

// key (2): seed, stream.
__device__ __forceinline__ Noise noise_of(const int64_t* key, int64_t position, Purpose purpose) {
    return {static_cast<uint64_t>(load_raw(key)), static_cast<uint32_t>(load_raw(key + 1)),
            static_cast<uint32_t>(position), purpose};
}
__device__ __forceinline__ Noise noise_at(const SampleTokensParams& p, int64_t row, int64_t) {
    return noise_of(p.keys + 2 * row, load_raw(p.positions + row), static_cast<Purpose>(p.purpose));
}
__device__ __forceinline__ Noise noise_at(const SpeculativeAcceptParams& p, int64_t row, int64_t t) {
    return noise_of(p.keys + 2 * row, load_raw(p.positions + row) + t, Purpose::token);
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
    // Of two races the smaller result is that of both together.
    __device__ uint64_t result() const {
        uint32_t bits;
        memcpy(&bits, &best, sizeof bits);
        return winner < 0 ? ~uint64_t{0} : uint64_t{bits} << 32 | static_cast<unsigned>(winner);
    }
    // -log(1 - v), v = (bits + 0.5) / 2³², accurate at both ends.
    __device__ static float exponential(uint32_t bits) {
        const bool low = bits < 0x80000000u;
        const float rest = (static_cast<float>(low ? bits : ~bits) + 0.5f) * 0x1p-32f;
        return low ? -log1pf(-rest) : -logf(rest);
    }
};

__device__ __forceinline__ int winner_of(uint64_t result) { return static_cast<int>(result & 0xffffffffu); }

// A token of those that measure(token, weight) is positive for. Where there is none the result means nothing.
template <typename Measure>
__device__ __forceinline__ int draw(const Memory& m, const Shortlist& law, const Noise& noise, Measure measure) {
    Race race;
    law.for_mine([&](int token, float weight) {
        const float mine = measure(token, weight);
        if (mine > 0.f) race.enter(token, mine, noise.bits(static_cast<uint32_t>(token)));
    });
    return winner_of(of_block(m, race.result(), smaller));
}
__device__ __forceinline__ int draw(const Memory& m, const Shortlist& law, const Noise& noise) {
    return draw(m, law, noise, [](int, float weight) { return weight; });
}

}  // namespace
}  // namespace speculative_mamba::cuda
