// A linear layer whose weights lie in blocks, in groups of sixteen rows; ops/block_formats.py says how.
//
// A block has a group, its warps every eighth block of features each. A lane has four features of four rows, and eight
// lanes have the features of a block; where a byte has two features, a lane has both, and four lanes a block. A lane
// adds up its products of a block, then their sum times the block's scale to that of its blocks before; lanes and then
// warps are added in trees of fixed shape.
#pragma once

#include <algorithm>

#include "linear.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kGroup = 16, kBlock = 32;  // rows of W, features
constexpr int kScaleBytes = 2 * kGroup;  // of a block
constexpr int kLine = 64;                // bytes to a multiple of which a group's scales are padded

// Bits of a word as a number, less `zero`: as the last bits of 2^23 they are one already.
__device__ __forceinline__ float value_of(uint32_t bits, float zero) {
    bits |= 0x4b000000u;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value - (0x1p23f + zero);
}

// A byte has a feature, or two.
struct Q8_0 {
    static constexpr int kHalves = 1;
    static __device__ __forceinline__ float value(uint32_t bytes, int, int i) {
        return value_of(bytes >> 8 * i & 255u, 128.f);
    }
};
struct Q4_0 {
    static constexpr int kHalves = 2;
    static __device__ __forceinline__ float value(uint32_t bytes, int half, int i) {
        return value_of(bytes >> (8 * i + 4 * half) & 15u, 8.f);
    }
};

template <typename Act, typename Format, int M>
__global__ void __launch_bounds__(kWarps* kWarp) multiply_block_rows(SkinnyLinearParams p, int64_t m0, int x_rows) {
    constexpr int kRows = 4, kLanes = 8 / Format::kHalves;  // of a lane; of a block
    constexpr int kBlocks = kWarp / 4 / kLanes;             // that a warp takes at a time
    SM_SHARED(float, of_warps, kWarps * M * kGroup);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const int quarter = lane % 4, i = lane / 4 % kLanes, blocks = static_cast<int>(p.in_features) / kBlock;
    const int64_t group = blockIdx.x;
    const uint8_t* scales = static_cast<const uint8_t*>(p.weight) + group * p.weight_row_stride;
    const uint8_t* quants = scales + (blocks * kScaleBytes + kLine - 1) / kLine * kLine;
    const Act* x = reinterpret_cast<const Act*>(p.x) + m0 * p.x_row_stride;
    wait_for_previous();
    float sums[M][kRows] = {};
    for (int b = warp * kBlocks + lane / (4 * kLanes); b < blocks; b += kWarps * kBlocks) {
        const Packed8 bytes = load_raw(
            reinterpret_cast<const Packed8*>(quants + (static_cast<int64_t>(b) * kLanes + i) * kLine) + quarter,
            From::constants);
        const Group<f16_t, kRows> scale = load_group<kRows>(
            reinterpret_cast<const f16_t*>(scales + b * kScaleBytes) + kRows * quarter, From::constants);
#pragma unroll
        for (int m = 0; m < M; m++) {
            float products[kRows] = {};
#pragma unroll
            for (int half = 0; half < Format::kHalves; half++) {
                const int64_t row_of_x = min(m, x_rows - 1) * p.x_row_stride;  // of the last for results that are none
                const Float4 input = load4(x + row_of_x + b * kBlock + half * kBlock / 2 + 4 * i, 4);
#pragma unroll
                for (int row = 0; row < kRows; row++) {
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        products[row] = fmaf(Format::value(bytes.pairs[row], half, k), input.v[k], products[row]);
                }
            }
#pragma unroll
            for (int row = 0; row < kRows; row++) sums[m][row] = fmaf(products[row], widen(scale.v[row]), sums[m][row]);
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int row = 0; row < kRows; row++) {
            float sum = sums[m][row];
#pragma unroll
            for (int mask = 4; mask < kWarp; mask *= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
            if (lane < 4) store(of_warps + (warp * M + m) * kGroup + kRows * quarter + row, sum);
        }
    }
    __syncthreads();
    const int64_t n = group * kGroup + thread % kGroup;
    const int m = thread / kGroup;
    if (m < x_rows && n < p.out_features) {
        const float bias = p.bias ? load(p.bias + n, From::constants) : 0.f;
        store_result(p, m0 + m, n, sum_of_warps(of_warps + thread, M * kGroup), bias);
    }
}

template <typename Act, typename Format, int M>
void launch_block_rows(const SkinnyLinearParams& p, int64_t m0, int x_rows, cudaStream_t stream) {
    launch(multiply_block_rows<Act, Format, M>, dim3(blocks_for(p.out_features, kGroup)), dim3(kWarps * kWarp), stream,
           p, m0, x_rows);
}

template <typename Act, typename Format>
void multiply_format(const SkinnyLinearParams& p, cudaStream_t stream) {
    for (int64_t m = 0; m < p.rows; m += 8) {
        const int x_rows = static_cast<int>(std::min<int64_t>(p.rows - m, 8));
        if (x_rows == 1) {
            launch_block_rows<Act, Format, 1>(p, m, x_rows, stream);
        } else if (x_rows == 2) {
            launch_block_rows<Act, Format, 2>(p, m, x_rows, stream);
        } else if (x_rows <= 5) {
            launch_block_rows<Act, Format, 5>(p, m, x_rows, stream);
        } else {
            launch_block_rows<Act, Format, 8>(p, m, x_rows, stream);
        }
    }
}

template <typename Act>
void multiply_blocks(const SkinnyLinearParams& p, cudaStream_t stream) {
    switch (p.weight_dtype) {
        case DType::q8_0: return multiply_format<Act, Q8_0>(p, stream);
        case DType::q4_0: return multiply_format<Act, Q4_0>(p, stream);
        default: throw_unknown_dtype(p.weight_dtype);
    }
}

}  // namespace
}  // namespace speculative_mamba::cuda
