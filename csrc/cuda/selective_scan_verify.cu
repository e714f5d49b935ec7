// A few lanes share a channel, each with four of its states in registers from the first token to the last: the state is
// read once, and every slot written once, in 16-byte accesses that lie side by side in a warp. What several tokens
// bring is loaded at once: B and C for the whole block, x, Δ and z by the lanes of a channel, each for other tokens, so
// that Δ and y cost a lane no more than its share.
//
// Any other number of states, of channels that share B or C, or any other layout, takes a second kernel, whose warps
// have a channel each and take token by token. It does the same arithmetic in the same order.
#include "scan.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr float kLog2e = 1.442695041f;

// Where a row and a channel lie.
template <typename Act, typename State>
struct RowPointers {
    const Act *x, *dt, *z, *B, *C;  // z may be null
    State* states;
    const float *A, *kept_B;
    float *kept_x, *kept_dt;  // null where every slot has its state
    Act* y;

    __device__ __forceinline__ RowPointers(const SelectiveScanParams& p, int64_t row, int64_t channel) {
        const auto of = static_cast<unsigned>(channel), all = static_cast<unsigned>(p.channels);
        const int64_t b_group = of / (all / static_cast<unsigned>(p.b_groups));
        const int64_t c_group = of / (all / static_cast<unsigned>(p.c_groups));
        x = reinterpret_cast<const Act*>(p.x) + row * p.x_batch_stride + channel;
        dt = reinterpret_cast<const Act*>(p.dt) + row * p.dt_batch_stride + channel;
        z = p.z ? reinterpret_cast<const Act*>(p.z) + row * p.z_batch_stride + channel : nullptr;
        B = reinterpret_cast<const Act*>(p.B) + row * p.B_batch_stride + b_group * p.state_size;
        C = reinterpret_cast<const Act*>(p.C) + row * p.C_batch_stride + c_group * p.state_size;
        A = p.A + channel * p.state_size;
        states = static_cast<State*>(p.states) + row * p.states_batch_stride + channel * p.state_size;
        const int64_t kept = row * p.input_slots;
        kept_B = p.input_B + (kept * p.b_groups + b_group) * p.state_size;
        kept_x = p.input_x + kept * p.channels + channel;
        kept_dt = p.input_dt + kept * p.channels + channel;
        y = reinterpret_cast<Act*>(p.y) + row * p.tokens * p.channels + channel;
    }
};

// Δ = 0 leaves every bit alone, whatever x and B are.
template <typename State>
__device__ __forceinline__ void step(Float4& h, const Float4& A, float dt, float dt_x, const Float4& b) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float next = rounded<State>(fmaf(power_of_2(dt * A.v[i]), h.v[i], dt_x * b.v[i]));
        h.v[i] = dt == 0.f ? h.v[i] : next;
    }
}
__device__ __forceinline__ Float4 in_powers_of_2(Float4 A) {
#pragma unroll
    for (int i = 0; i < 4; i++) A.v[i] *= kLog2e;
    return A;
}
// Of some tokens, which are those of the window or the kept inputs: x, Δ and z of tokens k · Lanes + lane, for each k,
// and a share of B and C.
template <typename T, int Lanes, int Rows>
struct Tokens : SmemStage<T, Lanes, Rows> {
    static constexpr int kOwn = (kTokens + Lanes - 1) / Lanes;
    T x[kOwn] = {}, dt[kOwn] = {}, z[kOwn] = {};
};

template <typename Act, typename State, int Lanes, bool Replays>
__global__ void __launch_bounds__(kThreads, Lanes == 4 && !Replays ? 5 : 4) scan(SelectiveScanParams p) {
    using Window = Tokens<Act, Lanes, 2>;
    using Inputs = Tokens<float, Lanes, 1>;
    constexpr int kOwn = Window::kOwn;
    SM_SHARED(Float4, block_B, 2 * kTokens * Lanes);
    SM_SHARED(Float4, block_kept_B, Replays ? kTokens * Lanes : 1);
    Float4* block_C = block_B + kTokens * Lanes;
    start_next();
    const int lane = static_cast<int>(threadIdx.x) % Lanes, own = lane % kTokens;
    const int64_t row = blockIdx.y,
                  wanted = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes) + threadIdx.x / Lanes;
    const bool exists = wanted < p.channels;  // all lanes of a warp take part in its sums; some hold no state
    const int64_t channel = exists ? wanted : p.channels - 1;
    const bool has_states = exists && 4 * lane < p.state_size;
    const int n = 4 * lane;
    const RowPointers<Act, State> at(p, row, channel);
    wait_for_weights(p.constant_weights);
    Float4 A{};
    if (has_states) A = in_powers_of_2(widen(load_packed4(at.A + n, From::constants)));
    const float dt_bias = load(p.dt_bias + channel, From::constants), skip = load(p.D + channel, From::constants);
    wait_for_previous();

    const int start = load_raw(p.start_slot + row), nulls = p.left_padding ? load_raw(p.left_padding + row) : 0;
    const int tokens = static_cast<int>(p.tokens), input_slots = static_cast<int>(p.input_slots);
    auto load_window = [&](int first) {
        Window window;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int t = first + k * Lanes + own;
            if (t >= tokens) continue;
            window.dt[k] = load_raw(at.dt + t * p.dt_token_stride);
            window.x[k] = load_raw(at.x + t * p.x_token_stride);
            if (at.z) window.z[k] = load_raw(at.z + t * p.z_token_stride);
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
            const int i = first + k * Lanes + own;
            if (!exists || i >= input_slots) continue;
            inputs.dt[k] = load(at.kept_dt + i * p.channels);
            inputs.x[k] = load(at.kept_x + i * p.channels);
        }
        inputs.load_from([&](Packed4<float>& four, int, int i, int quarter) {
            if (first + i >= input_slots || 4 * quarter >= p.state_size) return;
            four = load_packed4(at.kept_B + (first + i) * p.b_groups * p.state_size + 4 * quarter);
        });
        return inputs;
    };
    Packed4<State> before{};
    Window window = load_window(0);
    if (start < 0) {  // the row is left out
        for (int t = lane; exists && t < tokens; t += Lanes) store(at.y + t * p.channels, 0.f);
        return;
    }
    Inputs inputs;
    if (Replays) inputs = load_inputs(0);
    if (has_states) {
        const int64_t slot = Replays ? 0 : start;
        before = load_packed4(static_cast<const State*>(at.states + slot * p.states_slot_stride + n));
    }

    Float4 h = widen(before);
    auto feed = [&](const float (&dt)[kOwn], const float (&dt_x)[kOwn], const Float4* B, int i) {
        const float my_dt = warp_shuffle<Lanes>(group_value(dt, i), i),
                    my_dt_x = warp_shuffle<Lanes>(group_value(dt_x, i), i);
        step<State>(h, A, has_states ? my_dt : 0.f, my_dt_x, load_raw(B + i * Lanes + lane));
    };
    const bool to_slots = !Replays && has_states && !p.final_state_only;
    State* slot = at.states + p.write_slot * p.states_slot_stride + n;
    if constexpr (Replays) {
        const int count = static_cast<int>(replayed(p, start));
        for (int first = 0; first < count; first += kTokens) {
            inputs.store_to_smem(block_kept_B);
            __syncthreads();
            float dt[kOwn], dt_x[kOwn];
#pragma unroll
            for (int k = 0; k < kOwn; k++) {
                dt[k] = first + k * Lanes + own < count ? inputs.dt[k] : 0.f;
                dt_x[k] = dt[k] * inputs.x[k];
            }
            if (first + kTokens < count) inputs = load_inputs(first + kTokens);
#pragma unroll
            for (int i = 0; i < kTokens; i++)
                if (first + i < count) feed(dt, dt_x, block_kept_B, i);
            if (first + kTokens < count) __syncthreads();
        }
        if (has_states && p.write_slot == 0 && !p.final_state_only) store4(at.states + n, h);
        __syncwarp();  // every lane has read the inputs that others will overwrite
    }
    for (int first = 0; first < tokens; first += kTokens) {
        window.store_to_smem(block_B);
        float x[kOwn], dt[kOwn], dt_x[kOwn], z[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int t = first + k * Lanes + own;
            x[k] = widen(window.x[k]), z[k] = widen(window.z[k]);
            dt[k] = t < nulls || t >= tokens ? 0.f : softplus(widen(window.dt[k]) + dt_bias);
            dt_x[k] = dt[k] * x[k];
        }
        __syncthreads();
        if (first + kTokens < tokens) window = load_window(first + kTokens);
        auto scan_tokens = [&](auto count, int group) {
            float sums[kGroup] = {};
#pragma unroll
            for (int i = 0; i < decltype(count)::value; i++) {
                const int t = first + group + i;
                feed(dt, dt_x, block_B, group + i);
                add_products(sums[i], h, load_raw(block_C + (group + i) * Lanes + lane));
                if (to_slots && t < tokens) store4(slot, h);
                slot += p.states_slot_stride;
            }
            const float sum = sums_of_lanes<Lanes>(sums, lane);
            const int t = first + group + lane % kGroup;
            if (!exists || t >= tokens || lane / kGroup != group % Lanes / kGroup) return;  // another lane's token
            const float own_x = group_value(x, group);
            store(at.y + t * p.channels, result(sum, skip, own_x, at.z, group_value(z, group)));
            if (!Replays || p.final_state_only) return;
            store(at.kept_x + (p.write_slot + t) * p.channels, own_x);
            store(at.kept_dt + (p.write_slot + t) * p.channels, group_value(dt, group));
        };
#pragma unroll 1
        for (int group = 0; group < kTokens; group += kGroup) {
            const int left = tokens - first - group;
            if (left == 1) scan_tokens(OneToken{}, group);
            if (left > 1) scan_tokens(AGroup{}, group);
        }
        if (first + kTokens < tokens) __syncthreads();
    }
    if (has_states && p.final_state_only) store4(at.states + n, h);
    if (Replays && exists && lane == 0 && p.final_state_only) store(at.kept_dt, 0.f);
}

template <typename Act, typename State>
__global__ void __launch_bounds__(kThreads) scan_any(SelectiveScanParams p) {
    SM_SHARED(float, state, kWarps* kMaxStates);
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t row = blockIdx.y, channel = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
    if (channel >= p.channels) return;
    const RowPointers<Act, State> at(p, row, channel);
    const float dt_bias = load(p.dt_bias + channel), skip = load(p.D + channel);
    const int64_t start = load_raw(p.start_slot + row);
    if (start < 0) {
        for (int64_t t = lane; t < p.tokens; t += kWarp) store(at.y + t * p.channels, 0.f);
        return;
    }
    const int64_t nulls = p.left_padding ? load_raw(p.left_padding + row) : 0;
    const int size = static_cast<int>(p.state_size);
    float* h = state + warp * kMaxStates;
    auto count = [&](int n) { return size - n < 4 ? size - n : 4; };
    auto store_to = [&](State* slot) {
        for (int n = 4 * lane; n < size; n += 4 * kWarp) store4(slot + n, load4(h + n, count(n)), count(n));
    };
    auto feed = [&](int n, float dt, float dt_x, const auto* b) {
        Float4 next = load4(h + n, count(n));
        step<State>(next, in_powers_of_2(load4(at.A + n, count(n))), dt, dt_x, load4(b + n, count(n)));
        store4(h + n, next, count(n));
        return next;
    };

    const State* from = at.states + (p.input_dt ? 0 : start * p.states_slot_stride);
    for (int n = 4 * lane; n < size; n += 4 * kWarp) store4(h + n, load4(from + n, count(n)), count(n));
    if (p.input_dt) {
        for (int64_t i = 0; i < replayed(p, start); i++) {
            const float dt = load(at.kept_dt + i * p.channels), x = load(at.kept_x + i * p.channels);
            const float* b = at.kept_B + i * p.b_groups * p.state_size;
            for (int n = 4 * lane; n < size; n += 4 * kWarp) feed(n, dt, dt * x, b);
        }
        if (p.write_slot == 0 && !p.final_state_only) store_to(at.states);
        __syncwarp();  // every lane has read the inputs that the first will overwrite
    }
    for (int64_t t = 0; t < p.tokens; t++) {
        const float x = load(at.x + t * p.x_token_stride);
        const float dt = t < nulls ? 0.f : softplus(load(at.dt + t * p.dt_token_stride) + dt_bias);
        float sum = 0.f;
        for (int n = 4 * lane; n < size; n += 4 * kWarp) {
            const Float4 next = feed(n, dt, dt * x, at.B + t * p.B_token_stride);
            add_products(sum, next, load4(at.C + t * p.C_token_stride + n, count(n)));
        }
        sum = warp_reduce_sum<kWarp, kGroup>(sum);
        if (!p.input_dt && !p.final_state_only) store_to(at.states + (p.write_slot + t) * p.states_slot_stride);
        if (lane != 0) continue;
        const float z = at.z ? load(at.z + t * p.z_token_stride) : 0.f;
        store(at.y + t * p.channels, result(sum, skip, x, at.z, z));
        if (!p.input_dt || p.final_state_only) continue;
        store(at.kept_x + (p.write_slot + t) * p.channels, x);
        store(at.kept_dt + (p.write_slot + t) * p.channels, dt);
    }
    if (p.final_state_only) store_to(at.states);
    if (lane == 0 && p.input_dt && p.final_state_only) store(at.kept_dt, 0.f);
}

// All channels read the inputs B, so their new values are written by a launch of its own: four by a thread.
template <typename Act>
__global__ void __launch_bounds__(kThreads) keep_B(SelectiveScanParams p) {
    const int64_t size = p.b_groups * p.state_size, row = blockIdx.y, t = blockIdx.z;
    const int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
    if (at >= size) return;
    const int count = size - at < 4 ? static_cast<int>(size - at) : 4;
    wait_for_previous();
    const int64_t start = load_raw(p.start_slot + row);
    const Act* B = reinterpret_cast<const Act*>(p.B) + row * p.B_batch_stride + t * p.B_token_stride;
    const Float4 value = load4(B + at, count);
    if (start < 0) return;
    store4(p.input_B + (row * p.input_slots + p.write_slot + t) * size + at, value, count);
}

template <typename Act, typename State, int Lanes>
void run_fast(const SelectiveScanParams& p, cudaStream_t stream) {
    const dim3 blocks(blocks_for(p.channels, kThreads / Lanes), static_cast<unsigned>(p.batch));
    launch(p.input_dt ? scan<Act, State, Lanes, true> : scan<Act, State, Lanes, false>, blocks, dim3(kThreads), stream,
           p);
}

template <typename Act, typename State>
void run(const SelectiveScanParams& p, cudaStream_t stream) {
    const auto rows = static_cast<unsigned>(p.batch);
    const bool in_fours = p.state_size % 4 == 0 && fours<float>(p.A) && fours<float>(p.input_B) &&
                          fours<Act>(p.B, p.B_batch_stride, p.B_token_stride) &&
                          fours<Act>(p.C, p.C_batch_stride, p.C_token_stride) &&
                          fours<State>(p.states, p.states_batch_stride, p.states_slot_stride);
    auto shared = [&](int64_t block_reduce) {
        return share_group(p.b_groups, p.channels, block_reduce) && share_group(p.c_groups, p.channels, block_reduce);
    };
    if (in_fours && p.state_size <= 16 && shared(kThreads / 4)) {
        run_fast<Act, State, 4>(p, stream);
    } else if (in_fours && p.state_size > 16 && p.state_size <= 128 && shared(kWarps)) {
        run_fast<Act, State, 32>(p, stream);
    } else {
        if (p.state_size > kMaxStates) throw std::invalid_argument("the CUDA kernel takes up to 3072 states a channel");
        launch(scan_any<Act, State>, dim3(blocks_for(p.channels, kWarps), rows), dim3(kThreads), stream, p);
    }
    if (!p.input_dt || p.final_state_only) return;
    const dim3 blocks(blocks_for(p.b_groups * p.state_size, 4 * kThreads), rows, static_cast<unsigned>(p.tokens));
    launch(keep_B<Act>, blocks, dim3(kThreads), stream, p);
}

template <typename Act>
void with_activations(const SelectiveScanParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.states_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void selective_scan_verify(const SelectiveScanParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
