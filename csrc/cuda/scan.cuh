// The kernels of both scans. A few lanes share neighbouring channels, each lane with four states of each channel in
// registers from the first token to the last: the state is read once, and every slot written once, in 16-byte accesses
// that lie side by side in a warp. What several tokens bring is loaded at once: B and C for the whole block, Δ, x and z
// by the lanes, each for other pairs of a token and a channel, so that Δ and y cost a lane no more than its share.
//
// Any other number of states, or any other layout, takes `scan_any`, whose warps have a channel each and take token by
// token. It does the same arithmetic in the same order.
//
// A scan says how its struct is laid out, and what Δ and the decay are:
//   Params
//   kChannels       neighbouring channels that share B and C in registers
//   kFewLanes       lanes of up to 4·kFewLanes states; more take a warp
//   kOwnDt          every channel has its own Δ and x, else a head has them
//   min_blocks(lanes, replays)
//   heads(p), head_size(p), x_heads(p)
//   fits_block(p, channels)    `channels` neighbours have the same B, C and, but for kOwnDt, head
//   step_size(p, dt, bias), skip(p, head, channel)
//   load_A<InFours>(p, head, n, count)    of a lane's states
//   decay(A, dt)
//   Steps<Own>      what turns a state into the next, for a lane's pairs: `set` and `decay`
#pragma once

#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kTokens = 8;  // that are loaded together
constexpr int kGroup = 4;   // tokens whose results the lanes of a channel add up together
constexpr int kMaxStates = 3072;

// How many are scanned together. One that is left costs no more than it should.
using AGroup = std::integral_constant<int, kGroup>;
using OneToken = std::integral_constant<int, 1>;

// A thread's part of `Rows` rows of kTokens · Lanes fours, on its way to shared memory.
template <typename T, int Lanes, int Rows>
struct SmemStage {
    static constexpr int kFours = Rows * kTokens * Lanes, kPart = (kFours + kThreads - 1) / kThreads;
    Packed4<T> part[kPart] = {};

    // `load_one` gets a place, and whose it is: row, token and lane.
    template <typename Load>
    __device__ __forceinline__ void load_from(Load load_one) {
#pragma unroll
        for (int j = 0; j < kPart; j++) {
            const int four = static_cast<int>(threadIdx.x) + j * kThreads;
            if (four < kFours) load_one(part[j], four / (kTokens * Lanes), four / Lanes % kTokens, four % Lanes);
        }
    }
    __device__ __forceinline__ void store_to_smem(Float4* block) const {
#pragma unroll
        for (int j = 0; j < kPart; j++) {
            const int four = static_cast<int>(threadIdx.x) + j * kThreads;
            if (four < kFours) store_raw(block + four, widen(part[j]));
        }
    }
};

// Some tokens of the window or of the replayed inputs: Δ, x and z of a lane's pairs of a token and a channel, and a
// share of B and C.
template <typename T, int Lanes, int Rows, int Own>
struct Tokens : SmemStage<T, Lanes, Rows> {
    T x[Own] = {}, dt[Own] = {}, z[Own] = {};
};

// A lane's value for the group of token i: its last for the second group, where it has one for each.
template <int Own>
__device__ __forceinline__ float group_value(const float (&values)[Own], int i) {
    return i < kGroup ? values[0] : values[Own - 1];
}

// Δ = 0 leaves every bit alone, whatever x and B are.
template <typename State>
__device__ __forceinline__ void step(Float4& h, float dt, const Float4& decay, float dt_x, const Float4& b) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float next = rounded<State>(fmaf(decay.v[i], h.v[i], dt_x * b.v[i]));
        h.v[i] = dt == 0.f ? h.v[i] : next;
    }
}

__device__ __forceinline__ void add_products(float& sum, const Float4& h, const Float4& c) {
#pragma unroll
    for (int i = 0; i < 4; i++) sum = fmaf(h.v[i], c.v[i], sum);
}

__device__ __forceinline__ float result(float sum, float skip, float x, bool gated, float z) {
    const float y = sum + skip * x;
    return gated ? y * silu(z) : y;
}

// How many inputs lead from the kept state to the one a row starts from.
template <typename Params>
__device__ __forceinline__ int64_t replayed(const Params& p, int64_t start) {
    return p.write_slot == 0 ? start + 1 : p.write_slot;
}

// Where a row and a channel lie.
template <typename Scan, typename Act, typename State>
struct RowPointers {
    const Act *x, *dt, *z, *B, *C;  // z may be null
    State* states;
    float *kept_x, *kept_dt;  // null, like kept_B, where every slot has its state
    const float* kept_B;
    int64_t x_size, b_size;  // of a kept token
    Act* y;

    __device__ __forceinline__ RowPointers(const typename Scan::Params& p, int64_t row, int64_t channel) {
        const auto heads = static_cast<unsigned>(Scan::heads(p)), size = static_cast<unsigned>(Scan::head_size(p));
        const unsigned head = static_cast<unsigned>(channel) / size, part = static_cast<unsigned>(channel) % size;
        auto group = [&](int64_t groups) { return head / (heads / static_cast<unsigned>(groups)); };
        const int64_t x_at = group(Scan::x_heads(p)) * Scan::head_size(p) + part;
        const int64_t b_at = group(p.b_groups) * p.state_size, c_at = group(p.c_groups) * p.state_size;
        const int64_t channels = Scan::heads(p) * Scan::head_size(p);
        x_size = Scan::x_heads(p) * Scan::head_size(p), b_size = p.b_groups * p.state_size;
        x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + x_at;
        dt = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + head;
        z = p.z ? reinterpret_cast<const Act*>(p.z) + row * p.z_batch_stride + channel : nullptr;
        B = reinterpret_cast<const Act*>(p.B) + row * p.B_batch_stride + b_at;
        C = reinterpret_cast<const Act*>(p.C) + row * p.C_batch_stride + c_at;
        states = static_cast<State*>(p.states) + row * p.states_batch_stride + channel * p.state_size;
        const int64_t kept = row * p.input_slots;
        kept_x = p.input_x + kept * x_size + x_at;
        kept_dt = p.input_dt + kept * Scan::heads(p) + head;
        kept_B = p.input_B + kept * b_size + b_at;
        y = reinterpret_cast<Act*>(p.y) + row * p.tokens * channels + channel;
    }
};

template <typename Scan, typename Act, typename State, int Lanes, bool Replays>
__global__ void __launch_bounds__(kThreads, Scan::min_blocks(Lanes, Replays)) scan(typename Scan::Params p) {
    constexpr int kChannels = Scan::kChannels, kPairs = kGroup * kChannels, kLoaded = kTokens * kChannels;
    constexpr int kOwn = (kLoaded + Lanes - 1) / Lanes;
    using Window = Tokens<Act, Lanes, 2, kOwn>;
    using Inputs = Tokens<float, Lanes, 1, kOwn>;
    using Steps = typename Scan::template Steps<kOwn>;
    SM_SHARED(Float4, block_B, 2 * kTokens * Lanes);
    SM_SHARED(Float4, block_kept_B, Replays ? kTokens * Lanes : 1);
    Float4* block_C = block_B + kTokens * Lanes;
    start_next();
    const int lane = static_cast<int>(threadIdx.x) % Lanes, n = 4 * lane;
    const int64_t row = blockIdx.y, channels = Scan::heads(p) * Scan::head_size(p);
    const int64_t wanted = kChannels * (static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes) + threadIdx.x / Lanes);
    // All lanes of a warp take part in its sums; some hold no state.
    const bool exists = !Scan::kOwnDt || wanted < channels, has_states = exists && n < p.state_size;
    const int64_t channel = exists ? wanted : channels - 1;
    const int64_t head = static_cast<unsigned>(channel) / static_cast<unsigned>(Scan::head_size(p));
    const RowPointers<Scan, Act, State> at(p, row, channel);
    // A lane's pair k is of this token, among those loaded together, and of this channel.
    auto token_of = [&](int k) { return (k * Lanes + lane) % kLoaded / kPairs * kGroup + lane % kGroup; };
    const int own_channel = lane / kGroup % kChannels;
    wait_for_weights(p.constant_weights);
    const auto A = Scan::template load_A<true>(p, head, n, has_states ? 4 : 0, From::constants);
    const float dt_bias = load(p.dt_bias + head, From::constants);
    const float skip = load(Scan::skip(p, head, channel + own_channel), From::constants);
    wait_for_previous();

    const int start = load_raw(p.start_slot + row), left_padding = p.left_padding ? load_raw(p.left_padding + row) : 0;
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
            if (!exists || i >= input_slots) continue;
            inputs.dt[k] = load(at.kept_dt + i * Scan::heads(p));
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
        for (int t = lane / kChannels; exists && t < tokens; t += Lanes / kChannels) {
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
    auto update_state = [&](const Steps& steps, const Float4* B, int i) {
        const int first_pair = i / kGroup * kPairs + i % kGroup;
        auto of_token = [&](const float (&values)[kOwn], int pair) {
            return warp_shuffle<Lanes>(group_value(values, i), pair);
        };
        const float token_dt = of_token(steps.dt, first_pair), dt = has_states ? token_dt : 0.f;
        const Float4 decay =
            steps.decay_of(A, dt, [&](const float (&values)[kOwn]) { return of_token(values, first_pair); });
        const Float4 b = load_raw(B + i * Lanes + lane);
#pragma unroll
        for (int c = 0; c < kChannels; c++) {
            step<State>(h[c], dt, decay, of_token(steps.dt_x, first_pair + c * kGroup), b);
        }
    };
    auto store_to = [&](State* slot) {
#pragma unroll
        for (int c = 0; c < kChannels; c++)
            if (has_states) store4(slot + c * p.state_size, h[c]);
    };
    State* slot = at.states + p.write_slot * p.states_slot_stride + n;
    if constexpr (Replays) {
        const int count = static_cast<int>(replayed(p, start));
        for (int first = 0; first < count; first += kTokens) {
            inputs.store_to_smem(block_kept_B);
            __syncthreads();
            Steps steps;
#pragma unroll
            for (int k = 0; k < kOwn; k++) {
                steps.set(k, A, first + token_of(k) < count ? inputs.dt[k] : 0.f, inputs.x[k]);
            }
            if (first + kTokens < count) inputs = load_inputs(first + kTokens);
#pragma unroll
            for (int i = 0; i < kTokens; i++)
                if (first + i < count) update_state(steps, block_kept_B, i);
            if (first + kTokens < count) __syncthreads();
        }
        if (p.write_slot == 0 && !p.final_state_only) store_to(at.states + n);
        if (Scan::kOwnDt) __syncwarp();  // every lane has read the inputs that others will overwrite
    }
    for (int first = 0; first < tokens; first += kTokens) {
        window.store_to_smem(block_B);
        float x[kOwn], z[kOwn];
        Steps steps;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int t = first + token_of(k);
            x[k] = widen(window.x[k]), z[k] = widen(window.z[k]);
            const bool none = t < left_padding || t >= tokens;
            steps.set(k, A, none ? 0.f : Scan::step_size(p, widen(window.dt[k]), dt_bias), x[k]);
        }
        __syncthreads();
        if (first + kTokens < tokens) window = load_window(first + kTokens);
        auto scan_tokens = [&](auto count, int group) {
            float sums[kPairs] = {};
#pragma unroll
            for (int i = 0; i < decltype(count)::value; i++) {
                const int t = first + group + i;
                update_state(steps, block_B, group + i);
                const Float4 C = load_raw(block_C + (group + i) * Lanes + lane);
#pragma unroll
                for (int c = 0; c < kChannels; c++) add_products(sums[c * kGroup + i], h[c], C);
                if (!Replays && !p.final_state_only && t < tokens) store_to(slot);
                slot += p.states_slot_stride;
            }
            const float sum = sums_of_lanes<Lanes>(sums, lane);
            const float own_x = group_value(x, group), own_z = group_value(z, group);
            const int token = token_of(group ? kOwn - 1 : 0), t = first + token;
            const bool is_own = lane < kLoaded && (kPairs == Lanes || token / kGroup == group / kGroup);
            if (!exists || t >= tokens || !is_own) return;
            store(at.y + t * channels + own_channel, result(sum, skip, own_x, at.z, own_z));
            if (!Scan::kOwnDt || !Replays || p.final_state_only) return;
            store(at.kept_x + (p.write_slot + t) * at.x_size, own_x);
            store(at.kept_dt + (p.write_slot + t) * Scan::heads(p), group_value(steps.dt, group));
        };
#pragma unroll 1
        for (int group = 0; group < kTokens; group += kGroup) {
            const int left = tokens - first - group;
            if (left == 1) scan_tokens(OneToken{}, group);
            if (left > 1) scan_tokens(AGroup{}, group);
        }
        if (first + kTokens < tokens) __syncthreads();
    }
    if (p.final_state_only) store_to(at.states + n);
    if (Scan::kOwnDt && Replays && exists && lane == 0 && p.final_state_only) store(at.kept_dt, 0.f);
}

template <typename Scan, typename Act, typename State>
__global__ void __launch_bounds__(kThreads) scan_any(typename Scan::Params p) {
    SM_SHARED(float, state, kWarps* kMaxStates);
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t row = blockIdx.y, channels = Scan::heads(p) * Scan::head_size(p);
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarps + warp, head = channel / Scan::head_size(p);
    if (channel >= channels) return;
    const RowPointers<Scan, Act, State> at(p, row, channel);
    const float dt_bias = load(p.dt_bias + head), skip = load(Scan::skip(p, head, channel));
    const int64_t start = load_raw(p.start_slot + row);
    if (start < 0) {
        for (int64_t t = lane; t < p.tokens; t += kWarp) store(at.y + t * channels, 0.f);
        return;
    }
    const int64_t left_padding = p.left_padding ? load_raw(p.left_padding + row) : 0;
    const int size = static_cast<int>(p.state_size);
    float* h = state + warp * kMaxStates;
    auto count = [&](int n) { return size - n < 4 ? size - n : 4; };
    auto store_to = [&](State* slot) {
        for (int n = 4 * lane; n < size; n += 4 * kWarp) store4(slot + n, load4(h + n, count(n)), count(n));
    };
    auto update_state = [&](int n, float dt, float x, const auto* B) {
        Float4 next = load4(h + n, count(n));
        const Float4 decay = Scan::decay(Scan::template load_A<false>(p, head, n, count(n), From::memory), dt);
        step<State>(next, dt, decay, dt * x, load4(B + n, count(n)));
        store4(h + n, next, count(n));
        return next;
    };

    const State* from = at.states + (p.input_dt ? 0 : start * p.states_slot_stride);
    for (int n = 4 * lane; n < size; n += 4 * kWarp) store4(h + n, load4(from + n, count(n)), count(n));
    if (p.input_dt) {
        for (int64_t i = 0; i < replayed(p, start); i++) {
            const float dt = load(at.kept_dt + i * Scan::heads(p)), x = load(at.kept_x + i * at.x_size);
            for (int n = 4 * lane; n < size; n += 4 * kWarp) update_state(n, dt, x, at.kept_B + i * at.b_size);
        }
        if (p.write_slot == 0 && !p.final_state_only) store_to(at.states);
        if (Scan::kOwnDt) __syncwarp();  // every lane has read the inputs that the first will overwrite
    }
    for (int64_t t = 0; t < p.tokens; t++) {
        const float x = load(at.x + t * p.x_token_stride);
        const float dt = t < left_padding ? 0.f : Scan::step_size(p, load(at.dt + t * p.dt_token_stride), dt_bias);
        float sum = 0.f;
        for (int n = 4 * lane; n < size; n += 4 * kWarp) {
            const Float4 next = update_state(n, dt, x, at.B + t * p.B_token_stride);
            add_products(sum, next, load4(at.C + t * p.C_token_stride + n, count(n)));
        }
        sum = warp_reduce_sum<kWarp, kGroup * Scan::kChannels>(sum);
        if (!p.input_dt && !p.final_state_only) store_to(at.states + (p.write_slot + t) * p.states_slot_stride);
        if (lane != 0) continue;
        const float z = at.z ? load(at.z + t * p.z_token_stride) : 0.f;
        store(at.y + t * channels, result(sum, skip, x, at.z, z));
        if (!Scan::kOwnDt || !p.input_dt || p.final_state_only) continue;
        store(at.kept_x + (p.write_slot + t) * at.x_size, x);
        store(at.kept_dt + (p.write_slot + t) * Scan::heads(p), dt);
    }
    if (p.final_state_only) store_to(at.states);
    if (Scan::kOwnDt && lane == 0 && p.input_dt && p.final_state_only) store(at.kept_dt, 0.f);
}

__host__ __device__ __forceinline__ int64_t rounded_to_fours(int64_t values) { return (values + 3) / 4 * 4; }

// Leaves a token as the input of its slot, as far as many blocks read the old one: a thread four values of Δ, x or B.
// After prefill the kept state holds all tokens: input 0 counts as nothing.
template <typename Scan, typename Act>
__global__ void __launch_bounds__(kThreads) store_inputs(typename Scan::Params p) {
    start_next();
    const int64_t row = blockIdx.y, t = blockIdx.z, input = row * p.input_slots + p.write_slot + t;
    int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
    int64_t size = Scan::kOwnDt ? 0 : Scan::heads(p);
    const Act* from = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + t * p.dt_token_stride;
    float* to = p.input_dt + input * size;
    const bool is_dt = at < size;
    auto or_else = [&](const float* base, int64_t offset, float* kept, int64_t values) {
        if (at < size) return;
        at -= rounded_to_fours(size);
        from = reinterpret_cast<const Act*>(base) + offset, to = kept + input * values, size = values;
    };
    if (!Scan::kOwnDt) {
        or_else(p.x, row * p.x_batch_stride + t * p.x_token_stride, p.input_x, Scan::x_heads(p) * Scan::head_size(p));
    }
    or_else(p.B, row * p.B_batch_stride + t * p.B_token_stride, p.input_B, p.b_groups * p.state_size);
    if (at >= size || (p.final_state_only && !is_dt)) return;
    const int count = size - at < 4 ? static_cast<int>(size - at) : 4;
    if (!Scan::kOwnDt) wait_for_weights(p.constant_weights);
    const Float4 bias = is_dt ? load4(p.dt_bias + at, count, From::constants) : Float4{};
    wait_for_previous();
    const int64_t start = load_raw(p.start_slot + row);
    const int64_t left_padding = p.left_padding ? load_raw(p.left_padding + row) : 0;
    Float4 value = load4(from + at, count);
    if (start < 0) return;
    if (is_dt) {
        const bool nothing = p.final_state_only || t < left_padding;
#pragma unroll
        for (int i = 0; i < 4; i++) value.v[i] = nothing ? 0.f : Scan::step_size(p, value.v[i], bias.v[i]);
    }
    store4(to + at, value, count);
}

template <typename Scan, typename Act, typename State, int Lanes>
bool run_fast(const typename Scan::Params& p, cudaStream_t stream) {
    constexpr int kOfBlock = Scan::kChannels * kThreads / Lanes;
    const bool fits = p.state_size % 4 == 0 && Scan::fits_block(p, kOfBlock) && fours<float>(p.input_B) &&
                      fours<Act>(p.B, p.B_batch_stride, p.B_token_stride) &&
                      fours<Act>(p.C, p.C_batch_stride, p.C_token_stride) &&
                      fours<State>(p.states, p.states_batch_stride, p.states_slot_stride);
    if (!fits) return false;
    const dim3 blocks(blocks_for(Scan::heads(p) * Scan::head_size(p), kOfBlock), static_cast<unsigned>(p.batch));
    launch(p.input_dt ? scan<Scan, Act, State, Lanes, true> : scan<Scan, Act, State, Lanes, false>, blocks,
           dim3(kThreads), stream, p);
    return true;
}

template <typename Scan, typename Act, typename State>
void run(const typename Scan::Params& p, cudaStream_t stream) {
    const auto rows = static_cast<unsigned>(p.batch), tokens = static_cast<unsigned>(p.tokens);
    const int64_t channels = Scan::heads(p) * Scan::head_size(p);
    const bool done = p.state_size <= 4 * Scan::kFewLanes ? run_fast<Scan, Act, State, Scan::kFewLanes>(p, stream)
                      : p.state_size <= 4 * kWarp         ? run_fast<Scan, Act, State, kWarp>(p, stream)
                                                          : false;
    if (!done) {
        if (p.state_size > kMaxStates) throw std::invalid_argument("the CUDA kernel takes up to 3072 states a channel");
        launch(scan_any<Scan, Act, State>, dim3(blocks_for(channels, kWarps), rows), dim3(kThreads), stream, p);
    }
    if (!p.input_dt || (Scan::kOwnDt && p.final_state_only)) return;
    int64_t values = rounded_to_fours(p.b_groups * p.state_size);
    if (!Scan::kOwnDt) {
        values += rounded_to_fours(Scan::heads(p)) + rounded_to_fours(Scan::x_heads(p) * Scan::head_size(p));
    }
    const dim3 blocks(blocks_for(values, 4 * kThreads), rows, p.final_state_only ? 1 : tokens);
    launch(store_inputs<Scan, Act>, blocks, dim3(kThreads), stream, p);
}

template <typename Scan, typename Act>
void run_with_activations(const typename Scan::Params& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.states_dtype, run<Scan, Act, scalar_t>(p, stream));
}

template <typename Scan>
void run_scan(const typename Scan::Params& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, run_with_activations<Scan, scalar_t>(p, stream));
}

}  // namespace
}  // namespace speculative_mamba::cuda
