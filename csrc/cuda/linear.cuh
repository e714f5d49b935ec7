// How linear layers add up on tensor cores: the same whatever kernel computes a row, so that its bits are.
//
// The warps of a block partition the features: they take turns of 64. In a turn a lane has eight features of a row at a
// time, which are not those that tensor cores expect in it; as long as x and W agree on them it is the same
// sum. They round coarsely, so only the products of 16 features are added there, and those sums in float32.
#pragma once

#include "tensor_cores.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kMmaN = 8;                   // rows of x in a product of tensor cores, and half of those of W
constexpr int kProduct = 32;               // features of two products of tensor cores, side by side
constexpr int kWarpK = 2 * kProduct;       // features that a warp takes before it is the next one's turn
constexpr int kWarps = 8;                  // of a block
constexpr int kLaneBytes = 16;             // that a lane copies at a time, of four lanes to a row
constexpr int kRowBytes = 4 * kLaneBytes;  // of a row in a piece: what a warp copies at a time

__device__ __forceinline__ int min(int a, int b) { return a < b ? a : b; }

// Adds what 32 features give: of rows `low` and, eight further down, `high` of W, for eight rows of x.
template <typename Act>
__device__ __forceinline__ void add_product(float (&sums)[4], const Packed8& low, const Packed8& high,
                                            const Packed8& x) {
    const uint32_t (&a)[4] = low.pairs, (&b)[4] = high.pairs;
    float first[4] = {}, second[4] = {};
    multiply_tiles<Act>(first, {a[0], b[0], a[2], b[2]}, {x.pairs[0], x.pairs[2]});
    multiply_tiles<Act>(second, {a[1], b[1], a[3], b[3]}, {x.pairs[1], x.pairs[3]});
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += first[i] + second[i];
}

// The same for one row of W, whose values tensor cores take as they lie in registers: the one product is that of its
// upper, the other that of its lower rows, and what else they give is nothing.
template <typename Act>
__device__ __forceinline__ void add_product(float (&sums)[2], const Packed8& w, const Packed8& x) {
    float first[4] = {}, second[4] = {};
    multiply_tiles<Act>(first, w.pairs, {x.pairs[0], x.pairs[2]});
    multiply_tiles<Act>(second, w.pairs, {x.pairs[1], x.pairs[3]});
#pragma unroll
    for (int i = 0; i < 2; i++) sums[i] += first[i] + second[2 + i];
}

// What all warps give for a row of W: `at` is the first warp's sum, those of the others lie `stride` apart.
__device__ __forceinline__ float sum_of_warps(const float* at, int stride) {
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) total += load(at + warp * stride);
    return total;
}

// Result (m, n): a finished sum, scaled, then the bias.
__device__ __forceinline__ void store_result(const SkinnyLinearParams& p, int64_t m, int64_t n, float total,
                                             float bias) {
    total *= p.y_scale;
    if (p.bias) total += bias;
    store_as(p.y_dtype, p.y, m * p.out_features + n, total);
}

}  // namespace
}  // namespace speculative_mamba::cuda
