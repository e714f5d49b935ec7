// A warp takes a row of W against up to eight rows of x. Lane l sums features 4l … 4l+3 of every 128 in turn, then the
// lanes are added in a tree; neither how many rows share a pass nor the grid enters that order.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / kWarp;  // rows of W in a block

template <typename Act, typename Weight, int M>
__global__ void __launch_bounds__(kThreads) multiply(SkinnyLinearParams p, int64_t m0) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (n >= p.out_features) return;  // a whole warp
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
        if (lane == 0) store(reinterpret_cast<Act*>(p.y) + (m0 + m) * p.out_features + n, total);
    }
}

template <typename Act, typename Weight, int M>
void tile(const SkinnyLinearParams& p, int64_t m0, cudaStream_t stream) {
    launch(multiply<Act, Weight, M>, dim3(blocks_for(p.out_features, kRows)), dim3(kThreads), stream, p, m0);
}

template <typename Act, typename Weight>
void run(const SkinnyLinearParams& p, cudaStream_t stream) {
    if (p.out_features == 0) return;
    int64_t m = 0;
    for (; m + 8 <= p.rows; m += 8) tile<Act, Weight, 8>(p, m, stream);
    if (p.rows - m >= 4) tile<Act, Weight, 4>(p, m, stream), m += 4;
    if (p.rows - m >= 2) tile<Act, Weight, 2>(p, m, stream), m += 2;
    if (p.rows - m >= 1) tile<Act, Weight, 1>(p, m, stream);
}

template <typename Act>
void with_activations(const SkinnyLinearParams& p, cudaStream_t stream) {
    if (p.weight_dtype == DType::int8) return run<Act, int8_t>(p, stream);
    SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
