// Sixteen channels at a time: the history of a row is read before anything is written, then every token shifts it.
#include "../params.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Tokens whose lines are fetched ahead: they are further apart than hardware looks ahead.
constexpr int64_t kAhead = 8;

// Where sixteen channels find theirs in a token of x.
struct Source {
    bool contiguous;
    int64_t channels[kLanes];
};

inline Source source(const CausalConv1dParams& p, int64_t channel, int64_t count) {
    // Sixteen channels from a multiple of sixteen on lie within one block if sixteen divides it.
    Source s{p.repeat == 1 || p.block % kLanes == 0, {}};
    for (int64_t i = 0; i < (s.contiguous ? 1 : count); i++) {
        s.channels[i] = (channel + i) / (p.block * p.repeat) * p.block + (channel + i) % p.block;
    }
    return s;
}

inline Vec load_source(const float* x, const Source& s, int64_t count) {
    if (s.contiguous) return load_n(x + s.channels[0], count);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = x[s.channels[i]];
    return load(lanes);
}

// Width: how many taps there are, or 0 where that is not known before the call.
template <typename scalar_t, bool Gated, int Width>
void channel_block(const CausalConv1dParams& p, int64_t row, int64_t channel, int64_t count) {
    const int width = Width ? Width : static_cast<int>(p.width);
    const float* x = p.x + row * p.x_batch_stride;
    const float* input_gate = Gated && p.input_gate ? p.input_gate + row * p.input_gate_batch_stride : nullptr;
    const float* output_gate =
        Gated && p.output_gate ? p.output_gate + row * p.output_gate_batch_stride + channel : nullptr;
    const Source from = source(p, channel, count);
    const scalar_t* weight = static_cast<const scalar_t*>(p.weight) + channel * p.weight_channel_stride;
    float* window = p.window + row * p.window_batch_stride + channel;
    float* y = p.y + row * p.tokens * p.channels + channel;
    if (p.start_slot[row] < 0) return store_zeros(y, p.tokens, p.channels, count);
    const int64_t left_padding = p.left_padding ? p.left_padding[row] : 0;

    Vec taps[kMaxConvWidth], inputs[kMaxConvWidth];
    for (int k = 0; k < width; k++) {
        taps[k] = load_strided(weight + k * p.weight_tap_stride, p.weight_channel_stride, count);
    }
    Vec bias = p.bias ? load_n(p.bias + channel, count) : zero();
    for (int k = 0; k < width - 1; k++) {
        inputs[k] = load_n(window + (p.start_slot[row] + 1 + k) * p.window_row_stride, count);
    }
    if (!p.final_state_only && p.write_slot == 0) {
        for (int k = 0; k < width - 1; k++) store_n(window + k * p.window_row_stride, inputs[k], count);
    }
    for (int64_t t = 0; t < p.tokens; t++) {
        if (t + kAhead < p.tokens) {
            __builtin_prefetch(x + (t + kAhead) * p.x_token_stride + from.channels[0], 0, 3);
            __builtin_prefetch(y + (t + kAhead) * p.channels, 1, 3);
        }
        Vec input = t < left_padding ? zero() : load_source(x + t * p.x_token_stride, from, count);
        if (input_gate && t >= left_padding) {
            input = mul(input, load_source(input_gate + t * p.input_gate_token_stride, from, count));
        }
        inputs[width - 1] = input;
        if (!p.final_state_only) store_n(window + (width - 1 + p.write_slot + t) * p.window_row_stride, input, count);
        Vec sum = bias;
        for (int k = 0; k < width; k++) sum = fma(inputs[k], taps[k], sum);
        for (int k = 0; k < width - 1; k++) inputs[k] = inputs[k + 1];
        if (p.silu) sum = silu(sum);
        if (output_gate) sum = mul(sum, load_n(output_gate + t * p.output_gate_token_stride, count));
        store_n(y + t * p.channels, sum, count);
    }
    if (p.final_state_only) {
        for (int k = 0; k < width - 1; k++) store_n(window + (1 + k) * p.window_row_stride, inputs[k], count);
    }
}

template <typename scalar_t, bool Gated, int Width>
void run(const CausalConv1dParams& p, int threads) {
    const int64_t blocks = divide_up(p.channels, kLanes), items = p.batch * blocks;
    parallel_for(
        items, divide_up(items, 4 * threads), 8 * items * kLanes * p.tokens, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                int64_t channel = i % blocks * kLanes;
                channel_block<scalar_t, Gated, Width>(p, i / blocks, channel, min(kLanes, p.channels - channel));
            }
        });
}

}  // namespace

void causal_conv1d_verify(const CausalConv1dParams& p, int threads) {
    if (p.input_gate || p.output_gate) {
        SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t, true, 0>(p, threads));
    } else if (p.width == 4) {
        SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t, false, 4>(p, threads));
    } else {
        SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t, false, 0>(p, threads));
    }
}

}  // namespace speculative_mamba::SM_ISA
