// A linear layer of up to eight rows of x, which stay in registers while W streams through the memory of blocks.
#pragma once

#include <algorithm>
#include <iterator>

#include "copies.cuh"
#include "linear.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kBlockK = kWarps * kWarpK;            // features of a turn of each warp
constexpr int kBytesAhead = 80 * 1024;              // of W, that are on their way to a block if it has so much to do
constexpr int kKSteps[] = {1, 2, 3, 5, 8, 10, 16};  // of a warp: for those there are kernels
constexpr int kMaxTileBytes = 128 * 1024;           // of a tile, beside which blocks of other kernels find memory

// The most steps below `turns` that a kernel has.
constexpr int full_steps(int turns) {
    int steps = 0;
    for (int fewer : kKSteps) {
        if (fewer < turns) steps = fewer;
    }
    return steps;
}

// The rows of W that a block takes: some blocks one more. In tiles of so many.
struct RowPartition {
    int rows, blocks_with_more, tile_rows;
};

// Where things lie in shared memory: twice the warps' sums, then W, in places for as many tiles of 8·MmaRows rows as
// make enough bytes on their way. When a turn has been read, the same turn of a later tile takes its place.
template <int KSteps, int MmaRows>
struct Stream {
    static constexpr int kPieces = 2 * kWarpK / kRowBytes;
    static constexpr int kMmaRowBytes = kMmaN * kRowBytes;  // of a piece
    static constexpr int kStepBytes = MmaRows * kPieces * kMmaRowBytes;
    static constexpr int kTileBytes = kWarps * KSteps * kStepBytes;
    static constexpr int kTiles = (kBytesAhead + kTileBytes - 1) / kTileBytes;
    static constexpr int kFullSteps = full_steps(KSteps);
    static constexpr int kStepsPerStage = 2 / MmaRows;  // turns in a step
    static constexpr int kSteps = (KSteps + kStepsPerStage - 1) / kStepsPerStage;
    static constexpr int kSumsStride = kMmaN * MmaRows + 4;  // spreads rows of x over the banks
    static constexpr int kWarpSums = kMmaN * kSumsStride, kSums = kWarps * kWarpSums;
    static constexpr int kTilesAt = 2 * kSums * static_cast<int>(sizeof(float));

    static int64_t bytes(int tiles) { return kTilesAt + std::min(tiles, kTiles) * static_cast<int64_t>(kTileBytes); }
};

// Lane l copies, and later reads, what lies in quarter l % 4 of rows l / 4 and l / 4 + 8 of a tile; no other lane
// needs it. It has that quarter of row l / 4 of x too, or of the last row, for results that nobody stores.
template <typename Act, int KSteps, int MmaRows>
__global__ void __launch_bounds__(kWarps* kWarp, KSteps <= 5 ? 2 : 1)
    multiply_few_rows(SkinnyLinearParams p, int64_t m0, int x_rows, RowPartition partition) {
    using S = Stream<KSteps, MmaRows>;
    SM_LAUNCHED_MEMORY(memory);
    constexpr int kOfLane = kLaneBytes / static_cast<int>(sizeof(Act));
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const int row = lane / 4, block = static_cast<int>(blockIdx.x);
    const int64_t first_row = static_cast<int64_t>(block) * partition.rows + min(block, partition.blocks_with_more);
    const int rows = partition.rows + (block < partition.blocks_with_more), tile_rows = partition.tile_rows;
    const int first_k = warp * kWarpK + lane % 4 * kOfLane, left = static_cast<int>(p.in_features) - first_k;
    const auto has_feature = [&](int turn, int k) { return turn < S::kFullSteps || left > k; };
    char* const lane_memory = memory + S::kTilesAt + warp * (KSteps * S::kStepBytes) + lane * kLaneBytes;

    // The tile whose copies come next; of W this lane's part.
    const int64_t below = kMmaN * p.weight_row_stride, tile_stride = tile_rows * p.weight_row_stride;
    const Act* weight = static_cast<const Act*>(p.weight) + (first_row + row) * p.weight_row_stride + first_k;
    int rows_ahead = rows;
    const auto copy_step = [&](char* tile, int turn) {
#pragma unroll
        for (int half = 0; half < MmaRows; half++) {
            const bool has_row = row + half * kMmaN < min(rows_ahead, tile_rows);
#pragma unroll
            for (int piece = 0; piece < S::kPieces; piece++) {
                const int k = turn * kBlockK + piece * kProduct;
                copy_async(tile + turn * S::kStepBytes + (half * S::kPieces + piece) * S::kMmaRowBytes,
                           weight + half * below + k, has_row && has_feature(turn, k) ? kLaneBytes : 0,
                           From::constants);
            }
        }
    };
    const auto next_tile = [&] { weight += tile_stride, rows_ahead -= tile_rows; };

    wait_for_weights(p.constant_weights);
    for (int tile = 0; tile < S::kTiles; tile++, next_tile()) {
#pragma unroll
        for (int turn = 0; turn < KSteps; turn++) {
            if (rows_ahead > 0) copy_step(lane_memory + tile * S::kTileBytes, turn);
            if (turn % S::kStepsPerStage == S::kStepsPerStage - 1 || turn == KSteps - 1) end_group_of_copies();
        }
    }
    const int64_t x_row = m0 + min(row, x_rows - 1);
    const Act* const of_x = reinterpret_cast<const Act*>(p.x) + x_row * p.x_row_stride + first_k;
    float* of_warps = reinterpret_cast<float*>(memory);
    const int result_row = thread % (kMmaN * MmaRows), result_column = thread / (kMmaN * MmaRows);

    wait_before_next();
    Packed8 x[KSteps][2];
#pragma unroll
    for (int turn = 0; turn < KSteps; turn++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int k = turn * kBlockK + i * kProduct;
            x[turn][i] = has_feature(turn, k) ? load_raw(reinterpret_cast<const Packed8*>(of_x + k)) : Packed8{};
        }
    }
    int place = 0;
    for (int first = 0; first < rows; first += tile_rows) {
        const int64_t n = first_row + first + result_row;
        const bool has_result = result_column < x_rows && result_row < min(tile_rows, rows - first);
        const float bias = p.bias && has_result ? load(p.bias + n, From::constants) : 0.f;
        char* const at = lane_memory + place * S::kTileBytes;
        float sums[MmaRows][2] = {};
#pragma unroll
        for (int step = 0; step < KSteps; step += S::kStepsPerStage) {
            wait_for_copies<S::kTiles * S::kSteps - 1>();
            if (warp * kWarpK + step * kBlockK < p.in_features) {
#pragma unroll
                for (int turn = step; turn < step + S::kStepsPerStage && turn < KSteps; turn++) {
                    Packed8 w[MmaRows][2];
#pragma unroll
                    for (int half = 0; half < MmaRows; half++) {
#pragma unroll
                        for (int piece = 0; piece < S::kPieces; piece++) {
                            w[half][piece] = load_raw(reinterpret_cast<Packed8*>(
                                at + turn * S::kStepBytes + (half * S::kPieces + piece) * S::kMmaRowBytes));
                        }
                    }
                    copy_step(at, turn);
#pragma unroll
                    for (int half = 0; half < MmaRows; half++) {
                        add_product<Act>(sums[half], w[half][0], x[turn][0]);
                        add_product<Act>(sums[half], w[half][1], x[turn][1]);
                    }
                }
            }
            end_group_of_copies();
        }
        next_tile();
        if (++place == S::kTiles) place = 0;
#pragma unroll
        for (int i = 0; i < 2 * MmaRows; i++) {
            const int column = lane % 4 * 2 + i % 2, r = i / 2 * kMmaN + row;
            if (column < x_rows)
                store(of_warps + warp * S::kWarpSums + column * S::kSumsStride + r, sums[i / 2][i % 2]);
        }
        __syncthreads();
        if (has_result) {
            const float total = sum_of_warps(of_warps + result_column * S::kSumsStride + result_row, S::kWarpSums);
            store_result(p, m0 + result_column, n, total, bias);
        }
        // Of two places, so that while some threads still add up one, others can fill the other.
        of_warps = reinterpret_cast<float*>(memory) + (of_warps == reinterpret_cast<float*>(memory) ? S::kSums : 0);
    }
    wait_for_copies<0>();
}

// Whether there was memory enough.
template <typename Act, int KSteps, int MmaRows>
bool launch_few_rows(const SkinnyLinearParams& p, int64_t m0, int x_rows, cudaStream_t stream) {
    using S = Stream<KSteps, MmaRows>;
    const int n = static_cast<int>(p.out_features), blocks = std::min(multiprocessors(), n);
    if (blocks == 0) return true;
    const int max_rows = (n + blocks - 1) / blocks, tiles = (max_rows + kMmaN * MmaRows - 1) / (kMmaN * MmaRows);
    if (S::bytes(tiles) > max_shared_memory()) return false;
    const RowPartition partition{n / blocks, n % blocks, (max_rows + tiles - 1) / tiles};
    launch_with_memory(multiply_few_rows<Act, KSteps, MmaRows>, dim3(static_cast<unsigned>(blocks)),
                       dim3(kWarps * kWarp), S::bytes(tiles), stream, p, m0, x_rows, partition);
    return true;
}

template <typename Act, int KSteps>
bool with_k_steps(const SkinnyLinearParams& p, int64_t m0, int x_rows, cudaStream_t stream) {
    if constexpr (Stream<KSteps, 2>::kTileBytes <= kMaxTileBytes) {
        const bool flat = p.out_features <= static_cast<int64_t>(kMmaN) * multiprocessors();
        if (!flat && launch_few_rows<Act, KSteps, 2>(p, m0, x_rows, stream)) return true;
    }
    return launch_few_rows<Act, KSteps, 1>(p, m0, x_rows, stream);
}

// With the first number of turns that is enough.
template <typename Act, int I = 0>
bool dispatch_k_steps(const SkinnyLinearParams& p, int64_t m0, int x_rows, cudaStream_t stream) {
    if constexpr (I < static_cast<int>(std::size(kKSteps))) {
        if (p.in_features <= kKSteps[I] * kBlockK) return with_k_steps<Act, kKSteps[I]>(p, m0, x_rows, stream);
        return dispatch_k_steps<Act, I + 1>(p, m0, x_rows, stream);
    }
    return false;
}

// Whether there are few enough rows of x, which lie where eight features can be read at once, and memory and registers.
template <typename Act>
bool multiply_in_registers(const SkinnyLinearParams& p, int64_t m0, int x_rows, cudaStream_t stream) {
    const int64_t stride = p.rows > 1 ? p.x_row_stride * static_cast<int64_t>(sizeof(Act)) : 0;
    const bool aligned = reinterpret_cast<uintptr_t>(p.x) % kLaneBytes == 0 && stride % kLaneBytes == 0;
    return x_rows <= kMmaN && aligned && dispatch_k_steps<Act>(p, m0, x_rows, stream);
}

}  // namespace
}  // namespace speculative_mamba::cuda
