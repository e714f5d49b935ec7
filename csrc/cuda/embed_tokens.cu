// A thread for every four values.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128;

template <typename Table, typename Act>
__global__ void __launch_bounds__(kThreads) embed(EmbedTokensParams p) {
    wait_for_previous();
    const int64_t k = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x), m = blockIdx.y;
    if (k >= p.features) return;
    const int count = p.features - k < 4 ? static_cast<int>(p.features - k) : 4;
    const int64_t token = load_raw(p.tokens + m / p.window * p.tokens_row_stride + m % p.window);
    const Float4 value = load4(static_cast<const Table*>(p.table) + token * p.table_row_stride + k, count);
    store4(reinterpret_cast<Act*>(p.y) + m * p.features + k, value, count);
}

template <typename Table, typename Act>
void run(const EmbedTokensParams& p, cudaStream_t stream) {
    const int64_t rows = p.batch * p.window;
    if (rows == 0 || p.features == 0) return;
    const dim3 blocks(blocks_for(p.features, 4 * kThreads), static_cast<unsigned>(rows));
    launch(embed<Table, Act>, blocks, dim3(kThreads), stream, p);
}

template <typename Table>
void run_for(const EmbedTokensParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, (run<Table, scalar_t>(p, stream)));
}

}  // namespace

void embed_tokens(const EmbedTokensParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.table_dtype, run_for<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
