// A thread takes a channel, or four neighbouring ones, through all tokens of a row, with the last inputs in registers.
// Inputs and gates of several tokens are loaded at once.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 8;          // that are loaded together
constexpr int64_t kMany = 1 << 17;  // channels of all rows that keep the whole card busy by fours

// Taps lie at the end of `Taps` registers. With `Channels` 4 channels lie side by side in x too.
template <typename Act, typename Weight, int Taps, int Channels, bool Gated>
__global__ void __launch_bounds__(kThreads) convolve(CausalConv1dParams p) {
    using Inputs = Group<float, Channels>;
    start_next();
    const int64_t channel = Channels * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x), row = blockIdx.y;
    if (channel >= p.channels) return;
    const int first_tap = Taps - static_cast<int>(p.width);
    const int64_t source = p.repeat == 1 ? channel : channel / (p.block * p.repeat) * p.block + channel % p.block;
    const Act* x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + source;
    const Act* input_gate = reinterpret_cast<const Act*>(p.input_gate) + row * p.input_gate_batch_stride + source;
    const Act* output_gate = reinterpret_cast<const Act*>(p.output_gate) + row * p.output_gate_batch_stride + channel;
    const Weight* weight = static_cast<const Weight*>(p.weight) + channel * p.weight_channel_stride;
    float* window = p.window + row * p.window_batch_stride + channel;
    Act* y = reinterpret_cast<Act*>(p.y) + row * p.tokens * p.channels + channel;

    wait_for_weights(p.constant_weights);
    Inputs taps[Taps] = {}, bias = {};
#pragma unroll
    for (int c = 0; c < Channels; c++) {
#pragma unroll
        for (int k = 0; k < Taps; k++) {
            if (k < first_tap) continue;
            const int64_t tap = c * p.weight_channel_stride + (k - first_tap) * p.weight_tap_stride;
            taps[k].v[c] = load(weight + tap, From::constants);
        }
        if (p.bias) bias.v[c] = load(p.bias + channel + c, From::constants);
    }
    wait_for_previous();
    const int64_t start = load_raw(p.start_slot + row);
    const int64_t left_padding = p.left_padding ? load_raw(p.left_padding + row) : 0;
    using Tokens = Group<Act, Channels>;
    Tokens tokens[kTokens], input_gates[Gated ? kTokens : 1], output_gates[Gated ? kTokens : 1];
    const bool gates_input = Gated && p.input_gate, gates_output = Gated && p.output_gate;
    auto load_tokens = [&](int64_t first) {
#pragma unroll
        for (int i = 0; i < kTokens; i++) {
            const int64_t t = first + i;
            if (t >= p.tokens) continue;
            tokens[i] = load_group<Channels>(x + t * p.x_token_stride);
            if (gates_input) input_gates[i] = load_group<Channels>(input_gate + t * p.input_gate_token_stride);
            if (gates_output) output_gates[i] = load_group<Channels>(output_gate + t * p.output_gate_token_stride);
        }
    };
    load_tokens(0);
    if (start < 0) {  // the row is left out
        for (int64_t t = 0; t < p.tokens; t++) store_group<Channels>(y + t * p.channels, Group<Act, Channels>{});
        return;
    }
    Inputs inputs[Taps] = {};
#pragma unroll
    for (int k = 0; k + 1 < Taps; k++) {
        if (k < first_tap) continue;
        const int64_t slot_row = start + 1 + k - first_tap;
        inputs[k] = load_group<Channels>(static_cast<const float*>(window + slot_row * p.window_row_stride));
    }

    if (!p.final_state_only && p.write_slot == 0) {
#pragma unroll
        for (int k = 0; k + 1 < Taps; k++)
            if (k >= first_tap) store_group<Channels>(window + (k - first_tap) * p.window_row_stride, inputs[k]);
    }
    for (int64_t first = 0; first < p.tokens; first += kTokens) {
        if (first > 0) load_tokens(first);
#pragma unroll
        for (int i = 0; i < kTokens; i++) {
            const int64_t t = first + i;
            if (t >= p.tokens) break;
            Group<Act, Channels> out;
#pragma unroll
            for (int c = 0; c < Channels; c++) {
                float input = widen(tokens[i].v[c]);
                if (gates_input) input *= widen(input_gates[i].v[c]);
                inputs[Taps - 1].v[c] = t < left_padding ? 0.f : input;
                float sum = bias.v[c];
#pragma unroll
                for (int k = 0; k < Taps; k++)
                    if (k >= first_tap) sum = fmaf(inputs[k].v[c], taps[k].v[c], sum);
                if (p.silu) sum = silu(sum);
                if (gates_output) sum *= widen(output_gates[i].v[c]);
                out.v[c] = narrow<Act>(sum);
            }
            store_group<Channels>(y + t * p.channels, out);
            if (!p.final_state_only) {
                const int64_t slot_row = p.width - 1 + p.write_slot + t;
                store_group<Channels>(window + slot_row * p.window_row_stride, inputs[Taps - 1]);
            }
#pragma unroll
            for (int k = 0; k + 1 < Taps; k++) inputs[k] = inputs[k + 1];
        }
    }
    if (!p.final_state_only) return;
#pragma unroll
    for (int k = 0; k + 1 < Taps; k++)
        if (k >= first_tap) store_group<Channels>(window + (1 + k - first_tap) * p.window_row_stride, inputs[k]);
}

template <typename Act, typename Weight, bool Gated>
void run(const CausalConv1dParams& p, cudaStream_t stream) {
    const bool in_fours = !Gated && p.repeat == 1 && p.width <= 4 && p.channels % 4 == 0 &&
                          fours<Act>(p.x, p.x_batch_stride, p.x_token_stride) && fours<Act>(p.y) &&
                          fours<float>(p.window, p.window_batch_stride, p.window_row_stride);
    const int channels = in_fours && p.batch * p.channels >= kMany ? 4 : 1;
    auto kernel = channels == 4 ? convolve < Act, Weight, 4, Gated ? 1 : 4,
         Gated >
        : p.width <= 4 ? convolve<Act, Weight, 4, 1, Gated>
                       : convolve<Act, Weight, 8, 1, Gated>;
    const dim3 blocks(blocks_for(p.channels, channels * kThreads), static_cast<unsigned>(p.batch));
    launch(kernel, blocks, dim3(kThreads), stream, p);
}

template <typename Act>
void with_activations(const CausalConv1dParams& p, cudaStream_t stream) {
    if (p.input_gate || p.output_gate) {
        SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t, true>(p, stream));
    } else {
        SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t, false>(p, stream));
    }
}

}  // namespace

void causal_conv1d_verify(const CausalConv1dParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
