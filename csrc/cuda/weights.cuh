// From logits to weights, of which the likeliest token's is 1, and what filters make of them.
#pragma once

#include "block.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr float kSmallest = -87.f;  // weights of exp(-87) and below count as 0

// A weight, of at most 1, in fixed point.
constexpr float kUnits = 0x1p42f;
__device__ __forceinline__ uint64_t to_units(float weight) { return static_cast<uint64_t>(weight * kUnits); }

// What makes a weight a probability.
__device__ __forceinline__ float scale_of(uint64_t total) {
    return static_cast<float>(static_cast<double>(kUnits) / static_cast<double>(total));
}

struct Weigh {
    float peak, temperature;
    float bins;  // for a difference of 1

    Weigh() = default;
    __device__ Weigh(float peak, float temperature)
        : peak(peak), temperature(temperature), bins(kBins / (1.f - kSmallest) / temperature) {}
    __device__ float operator()(float logit) const {
        const float scaled = (logit - peak) / temperature;
        return scaled > kSmallest ? expf(scaled) : 0.f;
    }
    // The likelier, the smaller; kBins where the weight is 0.
    __device__ int bin(float logit) const {
        const float bin = (peak - logit) * bins;
        return bin < kBins ? static_cast<int>(bin) : kBins;
    }
};

inline __host__ __device__ bool ranks(const Filters& f, int64_t vocabulary) {
    return 0 < f.top_k && f.top_k < vocabulary;
}

inline __host__ __device__ bool tallies(const Filters& f, int64_t vocabulary) {
    return f.top_p < 1.f && !ranks(f, vocabulary);
}
inline __host__ __device__ bool cuts(const Filters& f, int64_t vocabulary) {
    return ranks(f, vocabulary) || f.top_p < 1.f;
}

// A nucleus is reached by the first tokens that count this, of all that count `total`.
__device__ __forceinline__ uint64_t nucleus_of(const Filters& f, uint64_t total) {
    const double enough = (static_cast<double>(f.top_p) - kRounding) * static_cast<double>(total);
    return enough > 1 ? static_cast<uint64_t>(ceil(enough)) : 1;
}
__device__ __forceinline__ float lightest_of(const Filters& f) { return static_cast<float>(f.min_p * (1 - kRounding)); }

}  // namespace
}  // namespace speculative_mamba::cuda
