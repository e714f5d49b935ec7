// What the scans of both layers share: tokens are taken in, and summed up, several at a time.
#pragma once

#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kTokens = 8;  // that are loaded together
constexpr int kGroup = 4;   // of which the lanes of a channel add up the results together
constexpr int kMaxStates = 3072;

// How many are taken in together. One that is left costs no more than it should.
using AGroup = std::integral_constant<int, kGroup>;
using OneToken = std::integral_constant<int, 1>;

// A thread's part of `Rows` rows of kTokens · Lanes fours, on its way to the memory of the block.
template <typename T, int Lanes, int Rows>
struct SmemStage {
    static constexpr int kFours = Rows * kTokens * Lanes, kPart = (kFours + kThreads - 1) / kThreads;
    Packed4<T> part[kPart] = {};

    // `load_one` gets a place, and whose it is: row, token and lane.
    template <typename Load>
    __device__ __forceinline__ void load_from(Load load_one) {
#pragma unroll
        for (int j = 0; j < kPart; j++) {
            const int four = static_cast<int>(threadIdx.x) + j * kThreads;
            if (four < kFours) load_one(part[j], four / (kTokens * Lanes), four / Lanes % kTokens, four % Lanes);
        }
    }
    __device__ __forceinline__ void store_to_smem(Float4* block) const {
#pragma unroll
        for (int j = 0; j < kPart; j++) {
            const int four = static_cast<int>(threadIdx.x) + j * kThreads;
            if (four < kFours) store_raw(block + four, widen(part[j]));
        }
    }
};

// A lane's value for the group of token i: its last for the second group, where it has one for each.
template <int Own>
__device__ __forceinline__ float group_value(const float (&values)[Own], int i) {
    return i < kGroup ? values[0] : values[Own - 1];
}

__device__ __forceinline__ void add_products(float& sum, const Float4& h, const Float4& c) {
#pragma unroll
    for (int i = 0; i < 4; i++) sum = fmaf(h.v[i], c.v[i], sum);
}

__device__ __forceinline__ float result(float sum, float skip, float x, bool gated, float z) {
    const float y = sum + skip * x;
    return gated ? y * silu(z) : y;
}

// How many inputs lead from the kept state to the one a row starts from.
template <typename Params>
__device__ __forceinline__ int64_t replayed(const Params& p, int64_t start) {
    return p.write_slot == 0 ? start + 1 : p.write_slot;
}

// Whether `size` neighbouring channels always have the same group.
inline bool share_group(int64_t groups, int64_t channels, int64_t size) {
    return groups == 1 || channels / groups % size == 0;
}

}  // namespace
}  // namespace speculative_mamba::cuda
