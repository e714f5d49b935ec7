// A few lanes share a channel, each with four of its states in registers from the first token to the last: the state is
// read once, and every slot written once, in 16-byte accesses that lie side by side in a warp. What tokens bring is
// loaded a few tokens ahead, so that their latencies overlap.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 2;  // tokens

// What a lane holds of a channel: states n to n + count, of at most four.
struct LaneState {
    Float4 h, A;
    int n, count;
};

// What a lane needs of a token.
struct Token {
    float x, dt, z;
    Float4 B, C;
};

// Δ = 0 leaves every bit alone, whatever x and B are.
template <typename State>
__device__ __forceinline__ void step(LaneState& s, float dt, float dt_x, const Float4& b) {
    if (dt == 0.f) return;
#pragma unroll
    for (int i = 0; i < 4; i++) { s.h.v[i] = rounded<State>(fmaf(expf(dt * s.A.v[i]), s.h.v[i], dt_x * b.v[i])); }
}

template <typename Act, typename State, int Lanes>
__global__ void __launch_bounds__(kThreads) scan(SelectiveScanParams p) {
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % Lanes;
    const int64_t row = blockIdx.y,
                  wanted = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes) + threadIdx.x / Lanes;
    const bool exists = wanted < p.channels;  // all lanes of a warp take part in its sums; some hold no state
    const int64_t channel = exists ? wanted : p.channels - 1;
    const bool first_lane = exists && lane == 0;
    const int64_t b_group = channel * p.b_groups / p.channels, c_group = channel * p.c_groups / p.channels;

    LaneState s;
    State* states = static_cast<State*>(p.states) + row * p.states_batch_stride + channel * p.state_size;
    Act* y = reinterpret_cast<Act*>(p.y) + row * p.tokens * p.channels + channel;
    const int64_t start = load_raw(p.start_slot + row);
    if (start < 0) {
        for (int64_t t = 0; first_lane && t < p.tokens; t++) store(y + t * p.channels, 0.f);
        return;
    }
    const State* from = states + (p.input_dt ? 0 : start * p.states_slot_stride);
    s.n = 4 * lane;
    const int left = exists ? static_cast<int>(p.state_size) - s.n : 0;
    s.count = left < 0 ? 0 : left < 4 ? left : 4;
    s.A = load4(p.A + channel * p.state_size + s.n, s.count);
    s.h = load4(from + s.n, s.count);
    float* input_x = p.input_x + row * p.input_slots * p.channels + channel;
    float* input_dt = p.input_dt + row * p.input_slots * p.channels + channel;
    if (p.input_dt) {
        const int64_t replayed = !exists ? 0 : p.write_slot == 0 ? start + 1 : p.write_slot;
        const float* B = p.input_B + (row * p.input_slots * p.b_groups + b_group) * p.state_size;
        for (int64_t i = 0; i < replayed; i++) {
            const float dt = load(input_dt + i * p.channels), x = load(input_x + i * p.channels);
            step<State>(s, dt, dt * x, load4(B + i * p.b_groups * p.state_size + s.n, s.count));
        }
        if (p.write_slot == 0 && !p.keep_last) store4(states + s.n, s.h, s.count);
        __syncwarp();  // every lane has read the inputs that the first will overwrite
    }
    const Act* x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + channel;
    const Act* raw_dt = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + channel;
    const Act* B = reinterpret_cast<const Act*>(p.B) + row * p.b_batch_stride + b_group * p.state_size;
    const Act* C = reinterpret_cast<const Act*>(p.C) + row * p.c_batch_stride + c_group * p.state_size;
    const Act* z = p.z ? reinterpret_cast<const Act*>(p.z) + row * p.z_batch_stride + channel : nullptr;
    const float dt_bias = load(p.dt_bias + channel), skip = load(p.D + channel);
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
            token.B = load4(B + t * p.b_token_stride + s.n, s.count);
            token.C = load4(C + t * p.c_token_stride + s.n, s.count);
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int64_t t = first + i;
            if (t >= p.tokens) break;
            const Token& token = tokens[i];
            const float dt = t < nulls ? 0.f : softplus(token.dt + dt_bias);
            step<State>(s, dt, dt * token.x, token.B);
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 4; n++) sum = fmaf(s.h.v[n], token.C.v[n], sum);
            sum = sum_of_lanes<Lanes>(sum) + skip * token.x;
            if (first_lane) {
                store(y + t * p.channels, z ? sum * silu(token.z) : sum);
                if (p.input_dt && !p.keep_last) {
                    store(input_x + (p.write_slot + t) * p.channels, token.x);
                    store(input_dt + (p.write_slot + t) * p.channels, dt);
                }
            }
            if (to_slots) store4(states + (p.write_slot + t) * p.states_slot_stride + s.n, s.h, s.count);
        }
    }
    if (p.keep_last) store4(states + s.n, s.h, s.count);
    if (first_lane && p.input_dt && p.keep_last) store(input_dt, 0.f);
}

// All channels read the inputs B, so their new values are written by a launch of its own.
template <typename Act>
__global__ void __launch_bounds__(kThreads) keep_B(SelectiveScanParams p) {
    wait_for_previous();
    const int64_t size = p.b_groups * p.state_size, row = blockIdx.y, t = blockIdx.x;
    if (load_raw(p.start_slot + row) < 0) return;
    const Act* B = reinterpret_cast<const Act*>(p.B) + row * p.b_batch_stride + t * p.b_token_stride;
    float* kept = p.input_B + (row * p.input_slots + p.write_slot + t) * size;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) store(kept + i, load(B + i));
}

template <typename Act, typename State, int Lanes>
void run(const SelectiveScanParams& p, cudaStream_t stream) {
    const dim3 blocks(blocks_for(p.channels, kThreads / Lanes), static_cast<unsigned>(p.batch));
    launch(scan<Act, State, Lanes>, blocks, dim3(kThreads), stream, p);
    if (!p.input_dt || p.keep_last) return;
    launch(keep_B<Act>, dim3(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch)), dim3(kThreads), stream,
           p);
}

template <typename Act, typename State>
void with_state(const SelectiveScanParams& p, cudaStream_t stream) {
    if (p.state_size <= 16) return run<Act, State, 4>(p, stream);
    if (p.state_size <= 64) return run<Act, State, 16>(p, stream);
    if (p.state_size <= 128) return run<Act, State, 32>(p, stream);
    throw std::invalid_argument("the CUDA kernel takes up to 128 states a channel");
}

template <typename Act>
void with_activations(const SelectiveScanParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.state_dtype, with_state<Act, scalar_t>(p, stream));
}

}  // namespace

void selective_scan(const SelectiveScanParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
