// A thread for every four values.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128;

template <typename Act>
__global__ void __launch_bounds__(kThreads) activate(MlpActivationParams p) {
    wait_for_previous();
    const int64_t k = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x), row = blockIdx.y;
    if (k >= p.features) return;
    const int count = p.features - k < 4 ? static_cast<int>(p.features - k) : 4;
    Float4 value = load4(reinterpret_cast<const Act*>(p.gate) + row * p.gate_row_stride + k, count);
    Float4 up = {{1.f, 1.f, 1.f, 1.f}};
    if (p.up) up = load4(reinterpret_cast<const Act*>(p.up) + row * p.up_row_stride + k, count);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float gate = value.v[i], positive = gate < 0.f ? 0.f : gate;  // a NaN stays one
        value.v[i] = (p.activation == kRelu2 ? positive * positive : silu(gate)) * up.v[i];
    }
    store4(reinterpret_cast<Act*>(p.y) + row * p.features + k, value, count);
}

template <typename Act>
void run(const MlpActivationParams& p, cudaStream_t stream) {
    if (p.rows == 0 || p.features == 0) return;
    const dim3 blocks(blocks_for(p.features, 4 * kThreads), static_cast<unsigned>(p.rows));
    launch(activate<Act>, blocks, dim3(kThreads), stream, p);
}

}  // namespace

void mlp_activation(const MlpActivationParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, run<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
