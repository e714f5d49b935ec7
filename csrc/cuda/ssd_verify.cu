// As selective_scan_verify, but that all channels of a head have the same Δ and decay: half a warp or a warp shares
// four channels, of each of which a lane has four states. A lane has x, z and y of one channel and token, or two. Old
// inputs are read by many blocks, so a second launch replaces them.
#include "scan.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kChannels = 4;  // that share B and C in registers
constexpr int kPairs = kGroup * kChannels;

// Where a row and a channel lie.
template <typename Act, typename State>
struct RowPointers {
    const Act *x, *dt, *z, *B, *C;  // z may be null
    State* states;
    const float *kept_x, *kept_dt, *kept_B;  // null where every slot has its state
    int64_t x_size, b_size;                  // of a kept token
    Act* y;

    __device__ __forceinline__ RowPointers(const SsdParams& p, int64_t row, int64_t channel) {
        const auto heads = static_cast<unsigned>(p.heads), size = static_cast<unsigned>(p.head_size);
        const unsigned head = static_cast<unsigned>(channel) / size, part = static_cast<unsigned>(channel) % size;
        auto group = [&](int64_t groups) { return head / (heads / static_cast<unsigned>(groups)); };
        const int64_t channels = p.heads * p.head_size, x_at = group(p.x_heads) * p.head_size + part;
        const int64_t b_at = group(p.b_groups) * p.state_size, c_at = group(p.c_groups) * p.state_size;
        x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + x_at;
        dt = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + head;
        z = p.z ? reinterpret_cast<const Act*>(p.z) + row * p.z_batch_stride + channel : nullptr;
        B = reinterpret_cast<const Act*>(p.B) + row * p.B_batch_stride + b_at;
        C = reinterpret_cast<const Act*>(p.C) + row * p.C_batch_stride + c_at;
        states = static_cast<State*>(p.states) + row * p.states_batch_stride + channel * p.state_size;
        x_size = p.x_heads * p.head_size, b_size = p.b_groups * p.state_size;
        const int64_t kept = row * p.input_slots;
        kept_x = p.input_x + kept * x_size + x_at;
        kept_dt = p.input_dt + kept * p.heads + head;
        kept_B = p.input_B + kept * b_size + b_at;
        y = reinterpret_cast<Act*>(p.y) + row * p.tokens * channels + channel;
    }
};

__host__ __device__ __forceinline__ int64_t rounded_to_fours(int64_t values) { return (values + 3) / 4 * 4; }

__device__ __forceinline__ float step_size(const SsdParams& p, float dt, float bias) {
    return clamped(softplus(dt + bias), p.dt_min, p.dt_max);
}

// Δ = 0 leaves every bit alone, whatever x and B are.
template <typename State>
__device__ __forceinline__ void step(Float4& h, float dt, float decay, float dt_x, const Float4& b) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float next = rounded<State>(fmaf(decay, h.v[i], dt_x * b.v[i]));
        h.v[i] = dt == 0.f ? h.v[i] : next;
    }
}

// Of some tokens, which are those of the window or the kept inputs: Δ, x and z of pairs of a token and a channel, and a
// share of B and C.
template <typename T, int Lanes, int Rows>
struct Tokens : SmemStage<T, Lanes, Rows> {
    static constexpr int kOwn = kTokens * kChannels / Lanes;
    T x[kOwn] = {}, dt[kOwn] = {}, z[kOwn] = {};
};

// What turns a state into the next, for a lane's pairs.
template <int Own>
struct Steps {
    float dt[Own], decay[Own], dt_x[Own];
};

template <typename Act, typename State, int Lanes, bool Replays>
__global__ void __launch_bounds__(kThreads, 3) scan(SsdParams p) {
    using Window = Tokens<Act, Lanes, 2>;
    using Inputs = Tokens<float, Lanes, 1>;
    constexpr int kOwn = Window::kOwn;
    SM_SHARED(Float4, block_B, 2 * kTokens * Lanes);
    SM_SHARED(Float4, block_kept_B, Replays ? kTokens * Lanes : 1);
    Float4* block_C = block_B + kTokens * Lanes;
    start_next();
    const int lane = static_cast<int>(threadIdx.x) % Lanes, n = 4 * lane;
    const int64_t row = blockIdx.y, channels = p.heads * p.head_size;
    const int64_t channel = kChannels * (static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes) + threadIdx.x / Lanes);
    const int64_t head = static_cast<unsigned>(channel) / static_cast<unsigned>(p.head_size);
    const bool has_states = n < p.state_size;
    const RowPointers<Act, State> at(p, row, channel);
    // A lane's pair k is of this token, among those loaded together, and of this channel.
    auto token_of = [&](int k) { return (k * Lanes + lane) / kPairs * kGroup + lane % kGroup; };
    const int own_channel = lane / kGroup % kChannels;
    wait_for_weights(p.constant_weights);
    const float A = load(p.A + head, From::constants), dt_bias = load(p.dt_bias + head, From::constants);
    const float skip = load(p.D + (p.d_per_channel ? channel + own_channel : head), From::constants);
    wait_for_previous();

    const int start = load_raw(p.start_slot + row), nulls = p.left_padding ? load_raw(p.left_padding + row) : 0;
    const int tokens = static_cast<int>(p.tokens), input_slots = static_cast<int>(p.input_slots);
    auto load_window = [&](int first) {
        Window window;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int t = first + token_of(k);
            if (t >= tokens) continue;
            window.dt[k] = load_raw(at.dt + t * p.dt_token_stride);
            window.x[k] = load_raw(at.x + t * p.x_token_stride + own_channel);
            if (at.z) window.z[k] = load_raw(at.z + t * p.z_token_stride + own_channel);
        }
        window.load_from([&](Packed4<Act>& four, int which, int i, int quarter) {
            const int t = first + i;
            if (t >= tokens || 4 * quarter >= p.state_size) return;
            four = load_packed4((which ? at.C + t * p.C_token_stride : at.B + t * p.B_token_stride) + 4 * quarter);
        });
        return window;
    };
    auto load_inputs = [&](int first) {
        Inputs inputs;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int i = first + token_of(k);
            if (i >= input_slots) continue;
            inputs.dt[k] = load(at.kept_dt + i * p.heads);
            inputs.x[k] = load(at.kept_x + i * at.x_size + own_channel);
        }
        inputs.load_from([&](Packed4<float>& four, int, int i, int quarter) {
            if (first + i >= input_slots || 4 * quarter >= p.state_size) return;
            four = load_packed4(at.kept_B + (first + i) * at.b_size + 4 * quarter);
        });
        return inputs;
    };
    Packed4<State> before[kChannels] = {};
    Window window = load_window(0);
    if (start < 0) {  // the row is left out
        for (int t = lane / kChannels; t < tokens; t += Lanes / kChannels) {
            store(at.y + t * channels + lane % kChannels, 0.f);
        }
        return;
    }
    Inputs inputs;
    if (Replays) inputs = load_inputs(0);
    if (has_states) {
        const State* from = at.states + (Replays ? 0 : start * p.states_slot_stride) + n;
#pragma unroll
        for (int c = 0; c < kChannels; c++) before[c] = load_packed4(from + c * p.state_size);
    }

    Float4 h[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; c++) h[c] = widen(before[c]);
    auto steps_of = [&](int k, float dt, float x, Steps<kOwn>& steps) {
        steps.dt[k] = dt, steps.decay[k] = expf(dt * A), steps.dt_x[k] = dt * x;
    };
    auto feed = [&](const Steps<kOwn>& steps, const Float4* B, int i) {
        const int first_pair = i / kGroup * kPairs + i % kGroup;
        const float of_token = warp_shuffle<Lanes>(group_value(steps.dt, i), first_pair),
                    dt = has_states ? of_token : 0.f;
        const float decay = warp_shuffle<Lanes>(group_value(steps.decay, i), first_pair);
        const Float4 b = load_raw(B + i * Lanes + lane);
#pragma unroll
        for (int c = 0; c < kChannels; c++) {
            step<State>(h[c], dt, decay, warp_shuffle<Lanes>(group_value(steps.dt_x, i), first_pair + c * kGroup), b);
        }
    };
    auto store_to = [&](State* slot) {
#pragma unroll
        for (int c = 0; c < kChannels; c++)
            if (has_states) store4(slot + c * p.state_size + n, h[c]);
    };
    State* slot = at.states + p.write_slot * p.states_slot_stride;
    if constexpr (Replays) {
        const int count = static_cast<int>(replayed(p, start));
        for (int first = 0; first < count; first += kTokens) {
            inputs.store_to_smem(block_kept_B);
            __syncthreads();
            Steps<kOwn> steps;
#pragma unroll
            for (int k = 0; k < kOwn; k++) {
                steps_of(k, first + token_of(k) < count ? inputs.dt[k] : 0.f, inputs.x[k], steps);
            }
            if (first + kTokens < count) inputs = load_inputs(first + kTokens);
#pragma unroll
            for (int i = 0; i < kTokens; i++)
                if (first + i < count) feed(steps, block_kept_B, i);
            if (first + kTokens < count) __syncthreads();
        }
        if (p.write_slot == 0 && !p.final_state_only) store_to(at.states);
    }
    for (int first = 0; first < tokens; first += kTokens) {
        window.store_to_smem(block_B);
        float x[kOwn], z[kOwn];
        Steps<kOwn> steps;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int t = first + token_of(k);
            x[k] = widen(window.x[k]), z[k] = widen(window.z[k]);
            const bool none = t < nulls || t >= tokens;
            steps_of(k, none ? 0.f : step_size(p, widen(window.dt[k]), dt_bias), x[k], steps);
        }
        __syncthreads();
        if (first + kTokens < tokens) window = load_window(first + kTokens);
        auto scan_tokens = [&](auto count, int group) {
            float sums[kPairs] = {};
#pragma unroll
            for (int i = 0; i < decltype(count)::value; i++) {
                const int t = first + group + i;
                feed(steps, block_B, group + i);
                const Float4 C = load_raw(block_C + (group + i) * Lanes + lane);
#pragma unroll
                for (int c = 0; c < kChannels; c++) add_products(sums[c * kGroup + i], h[c], C);
                if (!Replays && !p.final_state_only && t < tokens) store_to(slot);
                slot += p.states_slot_stride;
            }
            const float sum = sums_of_lanes<Lanes>(sums, lane);
            const float own_x = group_value(x, group), own_z = group_value(z, group);
            const int token = token_of(group ? kOwn - 1 : 0);
            if (first + token >= tokens || token / kGroup != group / kGroup) return;  // another lane's
            store(at.y + (first + token) * channels + own_channel, result(sum, skip, own_x, at.z, own_z));
        };
#pragma unroll 1
        for (int group = 0; group < kTokens; group += kGroup) {
            const int left = tokens - first - group;
            if (left == 1) scan_tokens(OneToken{}, group);
            if (left > 1) scan_tokens(AGroup{}, group);
        }
        if (first + kTokens < tokens) __syncthreads();
    }
    if (p.final_state_only) store_to(at.states);
}

template <typename Act, typename State>
__global__ void __launch_bounds__(kThreads) scan_any(SsdParams p) {
    SM_SHARED(float, state, kWarps* kMaxStates);
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t row = blockIdx.y, channels = p.heads * p.head_size;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarps + warp, head = channel / p.head_size;
    if (channel >= channels) return;
    const RowPointers<Act, State> at(p, row, channel);
    const float A = load(p.A + head), dt_bias = load(p.dt_bias + head);
    const float skip = load(p.D + (p.d_per_channel ? channel : head));
    const int64_t start = load_raw(p.start_slot + row);
    if (start < 0) {
        for (int64_t t = lane; t < p.tokens; t += kWarp) store(at.y + t * channels, 0.f);
        return;
    }
    const int64_t nulls = p.left_padding ? load_raw(p.left_padding + row) : 0;
    const int size = static_cast<int>(p.state_size);
    float* h = state + warp * kMaxStates;
    auto count = [&](int n) { return size - n < 4 ? size - n : 4; };
    auto store_to = [&](State* slot) {
        for (int n = 4 * lane; n < size; n += 4 * kWarp) store4(slot + n, load4(h + n, count(n)), count(n));
    };
    auto feed = [&](int n, float dt, float x, const auto* b) {
        Float4 next = load4(h + n, count(n));
        step<State>(next, dt, expf(dt * A), dt * x, load4(b + n, count(n)));
        store4(h + n, next, count(n));
        return next;
    };

    const State* from = at.states + (p.input_dt ? 0 : start * p.states_slot_stride);
    for (int n = 4 * lane; n < size; n += 4 * kWarp) store4(h + n, load4(from + n, count(n)), count(n));
    if (p.input_dt) {
        for (int64_t i = 0; i < replayed(p, start); i++) {
            const float dt = load(at.kept_dt + i * p.heads), x = load(at.kept_x + i * at.x_size);
            for (int n = 4 * lane; n < size; n += 4 * kWarp) feed(n, dt, x, at.kept_B + i * at.b_size);
        }
        if (p.write_slot == 0 && !p.final_state_only) store_to(at.states);
    }
    for (int64_t t = 0; t < p.tokens; t++) {
        const float x = load(at.x + t * p.x_token_stride);
        const float dt = t < nulls ? 0.f : step_size(p, load(at.dt + t * p.dt_token_stride), dt_bias);
        float sum = 0.f;
        for (int n = 4 * lane; n < size; n += 4 * kWarp) {
            const Float4 next = feed(n, dt, x, at.B + t * p.B_token_stride);
            add_products(sum, next, load4(at.C + t * p.C_token_stride + n, count(n)));
        }
        sum = warp_reduce_sum<kWarp, kPairs>(sum);
        if (!p.input_dt && !p.final_state_only) store_to(at.states + (p.write_slot + t) * p.states_slot_stride);
        if (lane != 0) continue;
        const float z = at.z ? load(at.z + t * p.z_token_stride) : 0.f;
        store(at.y + t * channels, result(sum, skip, x, at.z, z));
    }
    if (p.final_state_only) store_to(at.states);
}

// Leaves a token as the input of its slot: a thread four values of Δ, x or B. After prefill the kept state holds all
// tokens: input 0 counts as nothing.
template <typename Act>
__global__ void __launch_bounds__(kThreads) keep_inputs(SsdParams p) {
    start_next();
    const int64_t row = blockIdx.y, t = blockIdx.z, input = row * p.input_slots + p.write_slot + t;
    const int64_t x_size = p.x_heads * p.head_size, b_size = p.b_groups * p.state_size;
    int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x), size = p.heads;
    const Act* from = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + t * p.dt_token_stride;
    float* to = p.input_dt + input * size;
    const bool is_dt = at < size;
    auto or_else = [&](const float* base, int64_t offset, float* kept, int64_t values) {
        if (at < size) return;
        at -= rounded_to_fours(size);
        from = reinterpret_cast<const Act*>(base) + offset, to = kept + input * values, size = values;
    };
    or_else(p.x, row * p.x_batch_stride + t * p.x_token_stride, p.input_x, x_size);
    or_else(p.B, row * p.B_batch_stride + t * p.B_token_stride, p.input_B, b_size);
    if (at >= size || (p.final_state_only && !is_dt)) return;
    const int count = size - at < 4 ? static_cast<int>(size - at) : 4;
    wait_for_weights(p.constant_weights);
    const Float4 bias = is_dt ? load4(p.dt_bias + at, count, From::constants) : Float4{};
    wait_for_previous();
    const int64_t start = load_raw(p.start_slot + row);
    const int64_t nulls = p.left_padding ? load_raw(p.left_padding + row) : 0;
    Float4 value = load4(from + at, count);
    if (start < 0) return;
    if (is_dt) {
        const bool nothing = p.final_state_only || t < nulls;
#pragma unroll
        for (int i = 0; i < 4; i++) value.v[i] = nothing ? 0.f : step_size(p, value.v[i], bias.v[i]);
    }
    store4(to + at, value, count);
}

template <typename Act, typename State, int Lanes>
bool run_fast(const SsdParams& p, cudaStream_t stream) {
    constexpr int kOfBlock = kChannels * kThreads / Lanes;
    const bool fits = p.state_size % 4 == 0 && p.head_size % kOfBlock == 0 && fours<float>(p.input_B) &&
                      fours<Act>(p.B, p.B_batch_stride, p.B_token_stride) &&
                      fours<Act>(p.C, p.C_batch_stride, p.C_token_stride) &&
                      fours<State>(p.states, p.states_batch_stride, p.states_slot_stride);
    if (!fits) return false;
    const dim3 blocks(blocks_for(p.heads * p.head_size, kOfBlock), static_cast<unsigned>(p.batch));
    launch(p.input_dt ? scan<Act, State, Lanes, true> : scan<Act, State, Lanes, false>, blocks, dim3(kThreads), stream,
           p);
    return true;
}

template <typename Act, typename State>
void run(const SsdParams& p, cudaStream_t stream) {
    const auto rows = static_cast<unsigned>(p.batch);
    const bool done = p.state_size <= 64    ? run_fast<Act, State, 16>(p, stream)
                      : p.state_size <= 128 ? run_fast<Act, State, 32>(p, stream)
                                            : false;
    if (!done) {
        if (p.state_size > kMaxStates) throw std::invalid_argument("the CUDA kernel takes up to 3072 states a channel");
        launch(scan_any<Act, State>, dim3(blocks_for(p.heads * p.head_size, kWarps), rows), dim3(kThreads), stream, p);
    }
    if (!p.input_dt) return;
    const int64_t values = rounded_to_fours(p.heads) + rounded_to_fours(p.x_heads * p.head_size) +
                           rounded_to_fours(p.b_groups * p.state_size);
    const dim3 blocks(blocks_for(values, 4 * kThreads), rows, p.final_state_only ? 1 : static_cast<unsigned>(p.tokens));
    launch(keep_inputs<Act>, blocks, dim3(kThreads), stream, p);
}

template <typename Act>
void with_activations(const SsdParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.states_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void ssd_verify(const SsdParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
