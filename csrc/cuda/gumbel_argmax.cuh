// One token from weights, the argmax of log w plus Gumbel noise, computed as in cpu/gumbel_argmax.h: token i arrives
// after E / w, E exponential from the noise of the token, and the first wins; of equals the lowest id. Arrivals are
// float32: rounded as the weights are.
#pragma once

#include "../philox.h"
#include "probs.cuh"

namespace speculative_mamba::cuda {
namespace {

struct GumbelArgmax {
    float best = HUGE_VALF;
    int winner = -1;

    __device__ void enter(int token, float weight, uint32_t bits) {
        // -log(1 - v) >= v: most tokens are out of the race before a logarithm is taken.
        if (static_cast<float>(bits >> 8) * 0x1p-24f > best * weight * 1.000001f) return;
        const float arrival = exponential(bits) / weight;
        if (arrival < best || winner < 0) best = arrival, winner = token;
    }
    // Of two races the min result is that of both together.
    __device__ uint64_t result() const {
        uint32_t bits;
        memcpy(&bits, &best, sizeof bits);
        return winner < 0 ? ~uint64_t{0} : packed(bits, winner);
    }
    // -log(1 - v), v = (bits + 0.5) / 2³², accurate at both ends.
    __device__ static float exponential(uint32_t bits) {
        const bool low = bits < 0x80000000u;
        const float rest = (static_cast<float>(low ? bits : ~bits) + 0.5f) * 0x1p-32f;
        return low ? -log1pf(-rest) : -logf(rest);
    }
};

// A token of those that measure(token, weight) is positive for. Where there is none the result means nothing.
template <typename Measure>
__device__ __forceinline__ int gumbel_argmax(const TargetProbs& target, const Noise& noise, Measure measure) {
    GumbelArgmax argmax;
    if (target.listed >= 0) {
        target.for_each([&](int token, float weight) {
            const float mine = measure(token, weight);
            if (mine > 0.f) argmax.enter(token, mine, noise.bits(static_cast<uint32_t>(token)));
        });
        return token_of(block_reduce(target.m, argmax.result(), Min{}));
    }
    // A thread takes the four tokens of a counter of noise, whose numbers are wanted for few.
    const int vocabulary = target.position.vocabulary, counters = (vocabulary + 63) / 64 * 16;
    for (int counter = static_cast<int>(threadIdx.x); counter < counters; counter += static_cast<int>(blockDim.x)) {
        auto token_at = [&](int i) { return counter / 16 * 64 + counter % 16 + i * 16; };
        float logits[4], measured[4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; i++)
            logits[i] = token_at(i) < vocabulary ? load(target.position.logits + token_at(i)) : -HUGE_VALF;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            measured[i] = measure(token_at(i), target.weight(token_at(i), logits[i]));
            any |= measured[i] > 0.f;
        }
        if (!any) continue;
        uint32_t words[4][1];
        noise.fill<1>(words, static_cast<uint32_t>(counter));
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (measured[i] > 0.f) argmax.enter(token_at(i), measured[i], words[i][0]);
    }
    return token_of(block_reduce(target.m, argmax.result(), Min{}));
}
__device__ __forceinline__ int gumbel_argmax(const TargetProbs& target, const Noise& noise) {
    return gumbel_argmax(target, noise, [](int, float weight) { return weight; });
}

}  // namespace
}  // namespace speculative_mamba::cuda
