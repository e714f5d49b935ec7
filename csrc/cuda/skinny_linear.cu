// Two kernels. On tensor cores, where x and W have the same 16 bits or W has 8: a block takes 16 rows of W against up
// to 64 rows of x, and its warps share the features. By fused multiply-adds otherwise: a warp takes a row of W.
//
// Which features are added up where depends on K and the dtypes; how many rows x has does not enter.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kTile = 16, kColumns = 8;  // rows of W and of x in one product of tensor cores
constexpr int kWarps = 16;               // of a block, which share the features
constexpr int kStep = 32;                // features that a warp takes at a time, eight a lane
constexpr int kAhead = 2;                // steps of W that are on their way at a time

// Lane l holds features 8 (l % 4) … + 7 of a step, of row l / 4 of x and of rows l / 4 and l / 4 + 8 of W. Tensor cores
// expect other features in that lane; as long as x and W agree on them it is the same sum, and every load is of 16
// bytes. Products of one step are summed by the tensor core, which rounds coarsely, and steps in float32.
template <typename Act, typename Weight, int Tiles>
__global__ void __launch_bounds__(kWarps* kWarp) multiply_on_tensor_cores(SkinnyLinearParams p, int64_t m0) {
    SM_SHARED(float, of_warps, kWarps * kTile * kColumns);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const int row = lane / 4, within = 8 * (lane % 4);
    const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kTile;
    const int k_size = static_cast<int>(p.in_features), rows = static_cast<int>(p.rows - m0);
    const Weight* weight = static_cast<const Weight*>(p.weight) + (n0 + row) * p.weight_row_stride + within;
    const Act* x = reinterpret_cast<const Act*>(p.x) + (m0 + row) * p.x_row_stride + within;
    const int64_t half_tile = 8 * p.weight_row_stride, next_tile = kColumns * p.x_row_stride;
    const bool exists[2] = {n0 + row < p.out_features, n0 + row + 8 < p.out_features};
    const auto left = [&](int k) { return k_size - k - within < 8 ? k_size - k - within : 8; };

    for (int k = warp * kStep, ahead = 0; ahead < kAhead && k < k_size; k += kWarps * kStep, ahead++) {
        for (int half = 0; half < 2; half++)
            if (exists[half] && left(k) > 0) prefetch(weight + half * half_tile + k);
    }
    wait_for_previous();
    float sums[Tiles][4] = {};
    for (int first = warp * kStep; first < k_size; first += kAhead * kWarps * kStep) {
        Packed8 w[kAhead][2];
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
            const int k = first + a * kWarps * kStep;
#pragma unroll
            for (int half = 0; half < 2; half++)
                w[a][half] = load8<Act>(weight + half * half_tile + k, exists[half] ? left(k) : 0);
        }
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
            const int k = first + a * kWarps * kStep;
            if (k >= k_size) break;
            const Act* of_tile = x + k;
#pragma unroll
            for (int tile = 0; tile < Tiles; tile++, of_tile += next_tile) {
                if (tile * kColumns >= rows) break;
                const Packed8 v = load8<Act>(of_tile, tile * kColumns + row < rows ? left(k) : 0);
                float products[4] = {};
                const uint32_t (&low)[4] = w[a][0].pairs, (&high)[4] = w[a][1].pairs;
                multiply_tiles<Act>(products, {low[0], high[0], low[1], high[1]}, {v.pairs[0], v.pairs[1]});
                multiply_tiles<Act>(products, {low[2], high[2], low[3], high[3]}, {v.pairs[2], v.pairs[3]});
#pragma unroll
                for (int i = 0; i < 4; i++) sums[tile][i] += products[i];
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; tile++) {
        __syncthreads();  // the tile before has been read
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = row + i / 2 * 8, c = lane % 4 * 2 + i % 2;
            store(of_warps + (warp * kColumns + c) * kTile + r, sums[tile][i]);
        }
        __syncthreads();
        const int64_t m = m0 + tile * kColumns + thread / kTile, n = n0 + thread % kTile;
        if (thread >= kTile * kColumns || m >= p.rows || n >= p.out_features) continue;
        float total = 0.f;
        for (int w = 0; w < kWarps; w++) total += load(of_warps + w * kTile * kColumns + thread);
        if (sizeof(Weight) == 1) total *= load(p.weight_scale + n);
        if (p.bias) total += load(p.bias + n);
        store_as(p.y_dtype, p.y, m * p.out_features + n, total);
    }
}

template <typename Act, typename Weight, int Tiles>
void launch_tiles(const SkinnyLinearParams& p, int64_t m0, cudaStream_t stream) {
    launch(multiply_on_tensor_cores<Act, Weight, Tiles>, dim3(blocks_for(p.out_features, kTile)), dim3(kWarps * kWarp),
           stream, p, m0);
}

template <typename Act, typename Weight>
void on_tensor_cores(const SkinnyLinearParams& p, cudaStream_t stream) {
    for (int64_t m0 = 0; m0 < p.rows; m0 += 8 * kColumns) {
        const int64_t left = p.rows - m0;
        if (left <= kColumns) {
            launch_tiles<Act, Weight, 1>(p, m0, stream);
        } else {
            launch_tiles<Act, Weight, 8>(p, m0, stream);
        }
    }
}

constexpr int kThreads = 128, kRows = kThreads / kWarp;  // rows of W in a block

// Lane l sums features 4l … 4l+3 of every 128 in turn, then the lanes are added in a tree.
template <typename Act, typename Weight, int M>
__global__ void __launch_bounds__(kThreads) multiply(SkinnyLinearParams p, int64_t m0) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (n >= p.out_features) return;  // a whole warp
    wait_for_previous();
    const Weight* weight = static_cast<const Weight*>(p.weight) + n * p.weight_row_stride;
    const Act* x = reinterpret_cast<const Act*>(p.x) + m0 * p.x_row_stride;
    float sums[M] = {};
    for (int64_t k = 4 * lane; k < p.in_features; k += 4 * kWarp) {
        const int count = p.in_features - k < 4 ? static_cast<int>(p.in_features - k) : 4;
        const Float4 w = load4(weight + k, count);
#pragma unroll
        for (int m = 0; m < M; m++) {
            const Float4 input = load4(x + m * p.x_row_stride + k, count);
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m] = fmaf(w.v[i], input.v[i], sums[m]);
        }
    }
    const float scale = sizeof(Weight) == 1 ? load(p.weight_scale + n) : 1.f;
#pragma unroll
    for (int m = 0; m < M; m++) {
        float total = sum_of_lanes<kWarp>(sums[m]);
        if (sizeof(Weight) == 1) total *= scale;
        if (p.bias) total += load(p.bias + n);
        if (lane == 0) store_as(p.y_dtype, p.y, (m0 + m) * p.out_features + n, total);
    }
}

template <typename Act, typename Weight, int M>
void tile(const SkinnyLinearParams& p, int64_t m0, cudaStream_t stream) {
    launch(multiply<Act, Weight, M>, dim3(blocks_for(p.out_features, kRows)), dim3(kThreads), stream, p, m0);
}

template <typename Act, typename Weight>
void by_multiply_adds(const SkinnyLinearParams& p, cudaStream_t stream) {
    int64_t m = 0;
    for (; m + 8 <= p.rows; m += 8) tile<Act, Weight, 8>(p, m, stream);
    if (p.rows - m >= 4) tile<Act, Weight, 4>(p, m, stream), m += 4;
    if (p.rows - m >= 2) tile<Act, Weight, 2>(p, m, stream), m += 2;
    if (p.rows - m >= 1) tile<Act, Weight, 1>(p, m, stream);
}

template <typename Act, typename Weight>
void run(const SkinnyLinearParams& p, cudaStream_t stream) {
    if constexpr (sizeof(Act) == 2 && (std::is_same<Act, Weight>::value || sizeof(Weight) == 1)) {
        on_tensor_cores<Act, Weight>(p, stream);
    } else {
        by_multiply_adds<Act, Weight>(p, stream);
    }
}

template <typename Act>
void with_activations(const SkinnyLinearParams& p, cudaStream_t stream) {
    if (p.weight_dtype == DType::int8) return run<Act, int8_t>(p, stream);
    SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& p, cudaStream_t stream) {
    if (p.in_features > INT32_MAX - 65536) throw std::invalid_argument("skinny_linear: too many features for CUDA");
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
