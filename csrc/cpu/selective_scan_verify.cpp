// Lanes run over channels for what is per channel (softplus, gate) and over states for the recurrence, whose state
// stays in registers for up to kSegment tokens and for the kept inputs before them. Where only the last state is asked
// for (prefill), lanes run over channels for the recurrence too: the same operations, so the same bits, and no sums
// over lanes.
#include <cstring>

#include "../params.h"
#include "buffer.h"
#include "parallel_for.h"
#include "simd_math.h"
#include "transpose.h"

namespace speculative_mamba::SM_ISA {
namespace {

constexpr int kSegment = 16;

template <typename State>
struct Segment {
    int64_t row, channel, count;  // up to sixteen channels of one row
    int64_t first, tokens;        // tokens [first, first + tokens) of the window
    int64_t replayed;             // kept inputs [0, replayed) come before the first token
    const State* start;           // (count, N): state before all these
    State* kept;                  // (count, N): gets the state after what is replayed; may be null
    State* slots;                 // (count, N), a slot for every token: get the states after them; may be null
    State* end;                   // (count, N): gets the state after the last token; may be null
};

inline int64_t group(int64_t channel, int64_t groups, int64_t channels) {
    return groups == 1 ? 0 : channel * groups / channels;
}

// The state after one more token. Δ = 0 leaves every bit of it alone, whatever x and B are.
inline Vec step(Vec state, float dt, float dt_x, Vec A, const float* B, int64_t lanes) {
    if (dt == 0) return state;
    const Vec decay = exp(mul(broadcast(dt), A));
    return fma(decay, state, mul(broadcast(dt_x), load_n(B, lanes)));
}

// The state of one channel after the inputs that are replayed.
template <typename State>
inline Vec replay(const SelectiveScanParams& p, const Segment<State>& s, int64_t channel, int64_t n, int64_t lanes,
                  Vec A, Vec state) {
    const float* x = p.input_x + s.row * p.input_slots * p.channels + channel;
    const float* dt = p.input_dt + s.row * p.input_slots * p.channels + channel;
    const int64_t token = p.b_groups * p.state_size;
    const float* B =
        p.input_B + s.row * p.input_slots * token + group(channel, p.b_groups, p.channels) * p.state_size + n;
    for (int64_t i = 0; i < s.replayed; i++) {
        const float dt_x = dt[i * p.channels] * x[i * p.channels];
        state = rounded<State>(step(state, dt[i * p.channels], dt_x, A, B + i * token, lanes));
    }
    return state;
}

// Whether sixteen states of sixteen channels can go through a segment by recur_by_channels.
template <typename State>
inline bool lanes_are_channels(const SelectiveScanParams& p, const Segment<State>& s) {
    const int64_t last = s.channel + s.count - 1;
    return s.end && !s.slots && !s.replayed && !s.kept && s.count == kLanes && p.state_size % kLanes == 0 &&
           group(s.channel, p.b_groups, p.channels) == group(last, p.b_groups, p.channels) &&
           group(s.channel, p.c_groups, p.channels) == group(last, p.c_groups, p.channels);
}

// The sum of product(I), product(I + Step), …, as sum() adds sixteen lanes; few of them are held at a time.
template <int I, int Step, typename Product>
inline Vec add_states(const Product& product) {
    if constexpr (Step == kLanes) return product(I);
    else {
        const Vec first = add_states<I, 2 * Step>(product);
        return add(first, add_states<I + Step, 2 * Step>(product));
    }
}

// States n … n+15 of sixteen channels through the tokens of a segment; adds to y.
template <typename State>
void recur_by_channels(const SelectiveScanParams& p, const Segment<State>& s, int64_t n, const float (*dt)[kLanes],
                       const float (*dt_x)[kLanes], float (*y)[kLanes]) {
    alignas(64) float rows[kLanes][kLanes], A[kLanes][kLanes], states[kLanes][kLanes];
    for (int c = 0; c < kLanes; c++) store(rows[c], load(p.A + (s.channel + c) * p.state_size + n));
    transpose(rows[0], A[0]);
    for (int c = 0; c < kLanes; c++) store(rows[c], load(s.start + c * p.state_size + n));
    transpose(rows[0], states[0]);
    const float* B = p.B + s.row * p.B_batch_stride + s.first * p.B_token_stride +
                     group(s.channel, p.b_groups, p.channels) * p.state_size + n;
    const float* C = p.C + s.row * p.C_batch_stride + s.first * p.C_token_stride +
                     group(s.channel, p.c_groups, p.channels) * p.state_size + n;
    for (int64_t t = 0; t < s.tokens; t++, B += p.B_token_stride, C += p.C_token_stride) {
        const Vec delta = load(dt[t]), delta_x = load(dt_x[t]);
        const auto product = [&](int i) {
            const Vec state = load(states[i]), decay = exp(mul(delta, load(A[i])));
            const Vec next = fma(decay, state, mul(delta_x, broadcast(B[i])));
            const Vec kept = rounded<State>(if_zero(delta, state, next));
            store(states[i], kept);
            return mul(kept, broadcast(C[i]));
        };
        store(y[t], add(load(y[t]), add_states<0, 1>(product)));
    }
    transpose(states[0], rows[0]);
    for (int c = 0; c < kLanes; c++) store(s.end + c * p.state_size + n, load(rows[c]));
}

template <typename State>
void segment(const SelectiveScanParams& p, const Segment<State>& s) {
    alignas(64) float dt[kSegment][kLanes], dt_x[kSegment][kLanes], y[kSegment][kLanes];
    const int64_t left_padding = p.left_padding ? p.left_padding[s.row] : 0;
    const float* x = p.x + s.row * p.x_batch_stride + s.first * p.x_token_stride + s.channel;
    const float* raw_dt = p.dt + s.row * p.dt_batch_stride + s.first * p.dt_token_stride + s.channel;

    // Tokens are further apart than hardware looks ahead.
    const int64_t ahead = p.final_state_only ? kLanes : 0, later = ahead ? 0 : s.tokens;
    const auto prefetch = [&](int64_t t, int64_t channel) {
        if (t >= p.tokens) return;
        __builtin_prefetch(p.x + s.row * p.x_batch_stride + t * p.x_token_stride + channel, 0, 3);
        __builtin_prefetch(p.dt + s.row * p.dt_batch_stride + t * p.dt_token_stride + channel, 0, 3);
        __builtin_prefetch(p.y + (s.row * p.tokens + t) * p.channels + channel, 1, 3);
        if (p.z) __builtin_prefetch(p.z + s.row * p.z_batch_stride + t * p.z_token_stride + channel, 0, 3);
    };
    const Vec dt_bias = load_n(p.dt_bias + s.channel, s.count), skip = load_n(p.D + s.channel, s.count);
    for (int64_t t = 0; t < s.tokens; t++) {
        prefetch(s.first + later + t, s.channel + ahead);
        Vec input = load_n(x + t * p.x_token_stride, s.count);
        Vec delta = softplus(add(load_n(raw_dt + t * p.dt_token_stride, s.count), dt_bias));
        if (s.first + t < left_padding) delta = zero();
        store(dt[t], delta);
        store(dt_x[t], mul(delta, input));
        store(y[t], mul(skip, input));
    }
    const bool by_channels = lanes_are_channels(p, s);
    for (int64_t n = 0; n < p.state_size; n += kLanes) {
        if (by_channels) {
            recur_by_channels(p, s, n, dt, dt_x, y);
            continue;
        }
        const int64_t lanes = min(kLanes, p.state_size - n);
        Vec products[kSegment][kLanes];
        for (int64_t c = 0; c < s.count; c++) {
            const int64_t channel = s.channel + c, offset = c * p.state_size + n;
            const float* B = p.B + s.row * p.B_batch_stride + s.first * p.B_token_stride +
                             group(channel, p.b_groups, p.channels) * p.state_size + n;
            const float* C = p.C + s.row * p.C_batch_stride + s.first * p.C_token_stride +
                             group(channel, p.c_groups, p.channels) * p.state_size + n;
            const Vec A = load_n(p.A + channel * p.state_size + n, lanes);
            Vec state = load_n(s.start + offset, lanes);
            if (s.replayed) state = replay(p, s, channel, n, lanes, A, state);
            if (s.kept) store_n(s.kept + offset, state, lanes);
            for (int64_t t = 0; t < s.tokens; t++) {
                Vec next = step(state, dt[t][c], dt_x[t][c], A, B + t * p.B_token_stride, lanes);
                state = rounded<State>(next);  // what a call that starts here would read
                products[t][c] = mul(state, load_n(C + t * p.C_token_stride, lanes));
                // Rounds alike, and the work is shared.
                if (s.slots) store_n(s.slots + t * p.states_slot_stride + offset, next, lanes);
            }
            if (s.end) store_n(s.end + offset, state, lanes);
        }
        for (int64_t t = 0; t < s.tokens; t++) {
            for (int64_t c = s.count; c < kLanes; c++) products[t][c] = zero();
            store(y[t], add(load(y[t]), add_lanes(products[t])));
        }
    }
    for (int64_t t = 0; t < s.tokens; t++) {
        Vec out = load(y[t]);
        if (p.z) {
            const float* z = p.z + s.row * p.z_batch_stride + (s.first + t) * p.z_token_stride + s.channel;
            out = mul(out, silu(load_n(z, s.count)));
        }
        store_n(p.y + (s.row * p.tokens + s.first + t) * p.channels + s.channel, out, s.count);
    }
    if (!p.input_dt || p.final_state_only) return;
    for (int64_t t = 0; t < s.tokens; t++) {
        const int64_t input = (s.row * p.input_slots + p.write_slot + s.first + t) * p.channels + s.channel;
        store_n(p.input_x + input, load_n(x + t * p.x_token_stride, s.count), s.count);
        store_n(p.input_dt + input, load(dt[t]), s.count);
    }
}

// Up to sixteen channels of one row before the first token.
template <typename State>
Segment<State> beginning(const SelectiveScanParams& p, int64_t row, int64_t channel) {
    State* states = static_cast<State*>(p.states) + row * p.states_batch_stride + channel * p.state_size;
    Segment<State> s{row, channel, min(kLanes, p.channels - channel), 0, 0, 0, states, nullptr, nullptr, nullptr};
    if (!p.input_dt) {
        s.start = states + p.start_slot[row] * p.states_slot_stride;
    } else {
        s.replayed = p.write_slot == 0 ? p.start_slot[row] + 1 : p.write_slot;
        if (p.write_slot == 0 && !p.final_state_only) s.kept = states;
    }
    return s;
}

// The next tokens; `between` has the state from segment to segment where no slot holds it.
template <typename State>
void advance(const SelectiveScanParams& p, Segment<State>& s, State* between) {
    State* states = static_cast<State*>(p.states) + s.row * p.states_batch_stride + s.channel * p.state_size;
    s.tokens = min(kSegment, p.tokens - s.first);
    if (!p.input_dt && !p.final_state_only) s.slots = states + (p.write_slot + s.first) * p.states_slot_stride;
    s.end = p.final_state_only ? states : between;
    segment(p, s);
    s.start = s.slots ? s.slots + (s.tokens - 1) * p.states_slot_stride : s.end;
    s.replayed = 0;
    s.kept = nullptr;
    s.first += s.tokens;
}

// Channels of one row. Where only the last state is asked for, all of them go through a segment before the next: a
// token has its channels side by side, and the next token lies in another page.
template <typename State>
void channel_range(const SelectiveScanParams& p, int64_t row, int64_t first, int64_t last) {
    if (p.start_slot[row] < 0) {
        for (int64_t channel = first; channel < last; channel += kLanes)
            store_zeros(p.y + row * p.tokens * p.channels + channel, p.tokens, p.channels, min(kLanes, last - channel));
        return;
    }
    constexpr int64_t kTogether = 16;
    Segment<State> blocks[kTogether];
    thread_local Buffer buffer;
    const bool is_between = p.input_dt && p.tokens > kSegment && !p.final_state_only;
    State* between = is_between ? buffer.reserve<State>(kLanes * p.state_size) : nullptr;
    const int64_t together = p.final_state_only ? kTogether : 1;
    while (first < last) {
        int64_t count = 0;
        for (; count < together && first < last; count++, first += kLanes)
            blocks[count] = beginning<State>(p, row, first);
        while (blocks[0].first < p.tokens)
            for (int64_t i = 0; i < count; i++) advance(p, blocks[i], between);
        for (int64_t i = 0; i < count && p.input_dt && p.final_state_only; i++)
            store_n(p.input_dt + row * p.input_slots * p.channels + blocks[i].channel, zero(), blocks[i].count);
    }
}

template <typename State>
void run(const SelectiveScanParams& p, int threads) {
    const int64_t blocks = divide_up(p.channels, kLanes), items = p.batch * blocks, tokens = p.tokens + p.input_slots;
    const int64_t work = items * tokens * kLanes * divide_up(p.state_size, kLanes) * 64;
    parallel_for(items, divide_up(items, 4 * threads), work, threads, [&](int64_t first, int64_t last) {
        for (int64_t end; first < last; first = end) {
            const int64_t row = first / blocks;
            end = min(last, (row + 1) * blocks);
            const int64_t after = min(p.channels, (end - row * blocks) * kLanes);
            channel_range<State>(p, row, (first - row * blocks) * kLanes, after);
        }
    });
    if (!p.input_dt || p.final_state_only) return;
    // All channels share B, so its inputs change only now, when every block has read them.
    const int64_t size = p.b_groups * p.state_size;
    for (int64_t row = 0; row < p.batch; row++) {
        if (p.start_slot[row] < 0) continue;
        for (int64_t t = 0; t < p.tokens; t++) {
            const float* B = p.B + row * p.B_batch_stride + t * p.B_token_stride;
            std::memcpy(p.input_B + (row * p.input_slots + p.write_slot + t) * size, B, size * sizeof(float));
        }
    }
}

}  // namespace

void selective_scan_verify(const SelectiveScanParams& p, int threads) {
    SM_DISPATCH_DTYPE(p.states_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
