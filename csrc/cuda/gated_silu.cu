// A thread for every four values.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128;

template <typename Act>
__global__ void __launch_bounds__(kThreads) multiply(GatedSiluParams p) {
    wait_for_previous();
    const int64_t k = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x), row = blockIdx.y;
    if (k >= p.features) return;
    const int count = p.features - k < 4 ? static_cast<int>(p.features - k) : 4;
    const Float4 gate = load4(reinterpret_cast<const Act*>(p.gate) + row * p.gate_row_stride + k, count);
    Float4 up = load4(reinterpret_cast<const Act*>(p.up) + row * p.up_row_stride + k, count);
#pragma unroll
    for (int i = 0; i < 4; i++) up.v[i] *= silu(gate.v[i]);
    store4(reinterpret_cast<Act*>(p.y) + row * p.features + k, up, count);
}

template <typename Act>
void run(const GatedSiluParams& p, cudaStream_t stream) {
    if (p.rows == 0 || p.features == 0) return;
    const dim3 blocks(blocks_for(p.features, 4 * kThreads), static_cast<unsigned>(p.rows));
    launch(multiply<Act>, blocks, dim3(kThreads), stream, p);
}

}  // namespace

void gated_silu(const GatedSiluParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, run<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
