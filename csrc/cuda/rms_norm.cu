// A block takes one group of one row. Which thread adds what, and in which order, depends on the group's size alone.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <typename Act, typename Weight>
__global__ void __launch_bounds__(kThreads) normalise(RmsNormParams p) {
    SM_SHARED(float, of_warp, kWarps);
    wait_for_previous();
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t size = p.features / p.groups, row = blockIdx.y, first = blockIdx.x * size;
    const Act* x = reinterpret_cast<const Act*>(p.x) + row * p.x_row_stride + first;
    const Act* gate = p.gate ? reinterpret_cast<const Act*>(p.gate) + row * p.gate_row_stride + first : nullptr;
    const float* residual = p.residual ? p.residual + row * p.features + first : nullptr;
    float* residual_out = p.residual_out + row * p.features + first;
    const Weight* weight = static_cast<const Weight*>(p.weight) + first;
    Act* y = reinterpret_cast<Act*>(p.y) + row * p.features + first;

    float squares = 0.f;
    for (int64_t k = 4 * thread; k < size; k += 4 * kThreads) {
        const int count = size - k < 4 ? static_cast<int>(size - k) : 4;
        Float4 value = load4(x + k, count);
        if (residual) {
            const Float4 before = load4(residual + k, count);
#pragma unroll
            for (int i = 0; i < 4; i++) value.v[i] += before.v[i];
        }
        if (gate) {
            const Float4 g = load4(gate + k, count);
#pragma unroll
            for (int i = 0; i < 4; i++) value.v[i] *= silu(g.v[i]);
        }
        store4(residual_out + k, value, count);
#pragma unroll
        for (int i = 0; i < 4; i++) squares = fmaf(value.v[i], value.v[i], squares);
    }
    squares = sum_of_lanes<kWarp>(squares);
    if (thread % kWarp == 0) store(of_warp + thread / kWarp, squares);
    __syncthreads();
    float total = 0.f;
    for (int w = 0; w < kWarps; w++) total += load(of_warp + w);
    const float scale = 1.f / sqrtf(total / static_cast<float>(size) + p.eps);
    for (int64_t k = 4 * thread; k < size; k += 4 * kThreads) {  // each thread reads back what it wrote
        const int count = size - k < 4 ? static_cast<int>(size - k) : 4;
        Float4 value = load4(static_cast<const float*>(residual_out + k), count);
        const Float4 w = load4(weight + k, count);
#pragma unroll
        for (int i = 0; i < 4; i++) value.v[i] = value.v[i] * scale * w.v[i];
        store4(y + k, value, count);
    }
}

template <typename Act, typename Weight>
void run(const RmsNormParams& p, cudaStream_t stream) {
    if (p.rows == 0) return;
    const dim3 blocks(static_cast<unsigned>(p.groups), static_cast<unsigned>(p.rows));
    launch(normalise<Act, Weight>, blocks, dim3(kThreads), stream, p);
}

template <typename Act>
void with_activations(const RmsNormParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
