// A thread takes a channel through all tokens of a row, with the last inputs in registers.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxWidth = 8;  // taps lie at the end of as many registers

template <typename Act, typename Weight>
__global__ void __launch_bounds__(kThreads) convolve(CausalConv1dParams p) {
    wait_for_previous();
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
    if (channel >= p.channels) return;
    const int first = kMaxWidth - static_cast<int>(p.width);
    const int64_t source = p.repeat == 1 ? channel : channel / (p.block * p.repeat) * p.block + channel % p.block;
    const Act* x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + source;
    const Weight* weight = static_cast<const Weight*>(p.weight) + channel * p.weight_channel_stride;
    float* window = p.window + row * p.window_batch_stride + channel;
    Act* y = reinterpret_cast<Act*>(p.y) + row * p.tokens * p.channels + channel;
    const int64_t start = load_raw(p.start_slot + row);
    if (start < 0) {
        for (int64_t t = 0; t < p.tokens; t++) store(y + t * p.channels, 0.f);
        return;
    }
    const int64_t nulls = p.null_columns ? load_raw(p.null_columns + row) : 0;
    const float bias = p.bias ? load(p.bias + channel) : 0.f;

    float taps[kMaxWidth], inputs[kMaxWidth];
#pragma unroll
    for (int k = 0; k < kMaxWidth; k++) {
        const int tap = k - first;
        taps[k] = tap < 0 ? 0.f : load(weight + tap * p.weight_tap_stride);
        inputs[k] = tap < 0 || k + 1 == kMaxWidth ? 0.f : load(window + (start + 1 + tap) * p.window_row_stride);
    }
    const bool moves_history = !p.keep_last && p.write_slot == 0;
#pragma unroll
    for (int k = 0; k + 1 < kMaxWidth; k++) {
        if (moves_history && k >= first) store(window + (k - first) * p.window_row_stride, inputs[k]);
    }
    for (int64_t t = 0; t < p.tokens; t++) {
        const float input = t < nulls ? 0.f : load(x + t * p.x_token_stride);
        inputs[kMaxWidth - 1] = input;
        if (!p.keep_last) store(window + (p.width - 1 + p.write_slot + t) * p.window_row_stride, input);
        float sum = bias;
#pragma unroll
        for (int k = 0; k < kMaxWidth; k++)
            if (k >= first) sum = fmaf(inputs[k], taps[k], sum);
#pragma unroll
        for (int k = 0; k + 1 < kMaxWidth; k++) inputs[k] = inputs[k + 1];
        store(y + t * p.channels, p.silu ? silu(sum) : sum);
    }
    if (!p.keep_last) return;
#pragma unroll
    for (int k = 0; k + 1 < kMaxWidth; k++)
        if (k >= first) store(window + (1 + k - first) * p.window_row_stride, inputs[k]);
}

template <typename Act, typename Weight>
void run(const CausalConv1dParams& p, cudaStream_t stream) {
    const dim3 blocks(blocks_for(p.channels, kThreads), static_cast<unsigned>(p.batch));
    launch(convolve<Act, Weight>, blocks, dim3(kThreads), stream, p);
}

template <typename Act>
void with_activations(const CausalConv1dParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
