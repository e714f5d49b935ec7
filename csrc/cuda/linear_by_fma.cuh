// Linear layers by fused multiply-adds: a warp takes a row of W and a few of x.
#pragma once

#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kSums = 8;  // of a lane: short sums are accurate, and do not wait for another

// The products of a row of W with M rows of x, the same in each lane. Lane l takes features 4l … 4l+3 of every 128, and
// has a sum for each of eight features of two such groups. Its sums, then the lanes are added in a tree.
template <int M, typename Act, typename Weight>
__device__ __forceinline__ void multiply_row(const Weight* weight, const Act* const (&x)[M], int64_t features,
                                             float (&totals)[M]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    float sums[M][kSums] = {};
    for (int64_t first = 4 * lane; first < features; first += kSums * kWarp) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t k = first + half * 4 * kWarp, left = features - k;
            const int count = left < 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
            const Float4 w = load4(weight + k, count, From::constants);
#pragma unroll
            for (int m = 0; m < M; m++) {
                const Float4 input = load4(x[m] + k, count);
#pragma unroll
                for (int i = 0; i < 4; i++) sums[m][4 * half + i] = fmaf(w.v[i], input.v[i], sums[m][4 * half + i]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int step = kSums / 2; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < step; i++) sums[m][i] += sums[m][i + step];
        }
        totals[m] = warp_reduce_sum<kWarp>(sums[m][0]);
    }
}

}  // namespace
}  // namespace speculative_mamba::cuda
