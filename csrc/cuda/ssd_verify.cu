// As selective_scan_verify: a few lanes share a channel of a head, each with four of its states in registers from the
// first token to the last, and what tokens bring is loaded a few tokens ahead. Old inputs are read by many blocks, so a
// second launch replaces them.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 2;  // tokens

// What a lane needs of a token.
struct Token {
    float x, dt, z;
    Float4 B, C;
};

__device__ __forceinline__ float step_size(const SsdParams& p, float dt, float bias) {
    return fmaxf(p.dt_min, fminf(p.dt_max, softplus(dt + bias)));
}

// Δ = 0 leaves every bit alone, whatever x and B are.
template <typename State>
__device__ __forceinline__ void step(Float4& h, float dt, float A, float x, const Float4& b) {
    if (dt == 0.f) return;
    const float decay = expf(dt * A), dt_x = dt * x;
#pragma unroll
    for (int i = 0; i < 4; i++) h.v[i] = rounded<State>(fmaf(decay, h.v[i], dt_x * b.v[i]));
}

template <typename Act, typename State, int Lanes>
__global__ void __launch_bounds__(kThreads) scan(SsdParams p) {
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % Lanes;
    const int64_t row = blockIdx.y, channels = p.heads * p.head_size;
    const int64_t wanted = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes) + threadIdx.x / Lanes;
    const bool exists = wanted < channels;  // all lanes of a warp take part in its sums; some hold no state
    const int64_t channel = exists ? wanted : channels - 1, head = channel / p.head_size;
    const int64_t x_at = head / (p.heads / p.x_heads) * p.head_size + channel % p.head_size;
    const int n = 4 * lane, left = exists ? static_cast<int>(p.state_size) - n : 0;
    const int count = left < 0 ? 0 : left < 4 ? left : 4;
    const int64_t b_at = head / (p.heads / p.b_groups) * p.state_size + n;
    const int64_t c_at = head / (p.heads / p.c_groups) * p.state_size + n;
    const float A = load(p.A + head), dt_bias = load(p.dt_bias + head);
    const float skip = load(p.D + (p.d_per_channel ? channel : head));

    State* states = static_cast<State*>(p.states) + row * p.states_batch_stride + channel * p.state_size + n;
    Act* y = reinterpret_cast<Act*>(p.y) + row * p.tokens * channels + channel;
    const int64_t start = load_raw(p.start_slot + row);
    if (start < 0) {
        for (int64_t t = 0; exists && lane == 0 && t < p.tokens; t++) store(y + t * channels, 0.f);
        return;
    }
    Float4 h = load4(states + (p.input_dt ? 0 : start * p.states_slot_stride), count);
    if (p.input_dt) {
        const int64_t replayed = !exists ? 0 : p.write_slot == 0 ? start + 1 : p.write_slot;
        const int64_t first = row * p.input_slots, x_size = p.x_heads * p.head_size, b_size = p.b_groups * p.state_size;
        for (int64_t i = first; i < first + replayed; i++) {
            const float dt = load(p.input_dt + i * p.heads + head), x = load(p.input_x + i * x_size + x_at);
            step<State>(h, dt, A, x, load4(static_cast<const float*>(p.input_b) + i * b_size + b_at, count));
        }
        if (p.write_slot == 0 && !p.keep_last) store4(states, h, count);
    }
    const Act* x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + x_at;
    const Act* raw_dt = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + head;
    const Act* B = reinterpret_cast<const Act*>(p.B) + row * p.b_batch_stride + b_at;
    const Act* C = reinterpret_cast<const Act*>(p.C) + row * p.c_batch_stride + c_at;
    const Act* z = p.z ? reinterpret_cast<const Act*>(p.z) + row * p.z_batch_stride + channel : nullptr;
    const int64_t nulls = p.null_columns ? load_raw(p.null_columns + row) : 0;
    const bool to_slots = !p.input_dt && !p.keep_last;

    for (int64_t first = 0; first < p.tokens; first += kAhead) {
        Token tokens[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int64_t t = first + i;
            if (t >= p.tokens) break;
            Token& token = tokens[i];
            token.x = load(x + t * p.x_token_stride);
            token.dt = load(raw_dt + t * p.dt_token_stride);
            token.z = z ? load(z + t * p.z_token_stride) : 0.f;
            token.B = load4(B + t * p.b_token_stride, count);
            token.C = load4(C + t * p.c_token_stride, count);
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int64_t t = first + i;
            if (t >= p.tokens) break;
            const Token& token = tokens[i];
            const float dt = t < nulls ? 0.f : step_size(p, token.dt, dt_bias);
            step<State>(h, dt, A, token.x, token.B);
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 4; n++) sum = fmaf(h.v[n], token.C.v[n], sum);
            sum = sum_of_lanes<Lanes>(sum) + skip * token.x;
            if (exists && lane == 0) store(y + t * channels, z ? sum * silu(token.z) : sum);
            if (to_slots) store4(states + (p.write_slot + t) * p.states_slot_stride, h, count);
        }
    }
    if (p.keep_last) store4(states, h, count);
}

// Leaves a token as the input of its slot. After prefill the kept state holds all tokens: input 0 counts as nothing.
template <typename Act>
__global__ void __launch_bounds__(kThreads) keep_inputs(SsdParams p) {
    wait_for_previous();
    const int64_t row = blockIdx.y, t = blockIdx.x, input = row * p.input_slots + p.write_slot + t;
    if (load_raw(p.start_slot + row) < 0) return;
    const int64_t x_size = p.x_heads * p.head_size, b_size = p.b_groups * p.state_size;
    const Act* x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + t * p.x_token_stride;
    const Act* dt = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + t * p.dt_token_stride;
    const Act* B = reinterpret_cast<const Act*>(p.B) + row * p.b_batch_stride + t * p.b_token_stride;
    const bool nothing = p.keep_last || (p.null_columns && t < load_raw(p.null_columns + row));
    for (int64_t h = threadIdx.x; h < p.heads; h += kThreads) {
        store(p.input_dt + input * p.heads + h, nothing ? 0.f : step_size(p, load(dt + h), load(p.dt_bias + h)));
    }
    if (p.keep_last) return;
    for (int64_t i = threadIdx.x; i < x_size; i += kThreads) store(p.input_x + input * x_size + i, load(x + i));
    for (int64_t i = threadIdx.x; i < b_size; i += kThreads) store(p.input_b + input * b_size + i, load(B + i));
}

template <typename Act, typename State, int Lanes>
void run(const SsdParams& p, cudaStream_t stream) {
    const auto rows = static_cast<unsigned>(p.batch);
    const dim3 blocks(blocks_for(p.heads * p.head_size, kThreads / Lanes), rows);
    launch(scan<Act, State, Lanes>, blocks, dim3(kThreads), stream, p);
    if (!p.input_dt) return;
    const dim3 tokens(p.keep_last ? 1 : static_cast<unsigned>(p.tokens), rows);
    launch(keep_inputs<Act>, tokens, dim3(kThreads), stream, p);
}

template <typename Act, typename State>
void with_state(const SsdParams& p, cudaStream_t stream) {
    if (p.state_size <= 16) return run<Act, State, 4>(p, stream);
    if (p.state_size <= 64) return run<Act, State, 16>(p, stream);
    if (p.state_size <= 128) return run<Act, State, 32>(p, stream);
    throw std::invalid_argument("the CUDA kernel takes up to 128 states a channel");
}

template <typename Act>
void with_activations(const SsdParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.state_dtype, with_state<Act, scalar_t>(p, stream));
}

}  // namespace

void ssd(const SsdParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
