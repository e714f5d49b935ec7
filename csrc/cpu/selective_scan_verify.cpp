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
// Of the slots that a call writes, from which on they go past the caches: layers that follow would drive them out.
constexpr int64_t kManyBytes = 256 * 1024;

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

// What is per channel, for every token of a segment.
struct PerChannel {
    bool waits;  // whether Δ is zero anywhere
    alignas(64) float dt[kSegment][kLanes], dt_x[kSegment][kLanes], y[kSegment][kLanes], gate[kSegment][kLanes];
};

// The state after one more token. Δ = 0 leaves every bit of it alone, whatever x and B are; there is none without
// `Waits`.
template <bool Waits>
inline Vec stepped(Vec state, Vec decay, float dt, float dt_x, Vec B) {
    if (Waits && dt == 0) return state;
    return fma(decay, state, mul(broadcast(dt_x), B));
}

// B and C of the segment's first token, of the group that a channel uses.
template <typename State>
inline const float* B_of(const SelectiveScanParams& p, const Segment<State>& s, int64_t channel) {
    return p.B + s.row * p.B_batch_stride + s.first * p.B_token_stride +
           group(channel, p.b_groups, p.channels) * p.state_size;
}
template <typename State>
inline const float* C_of(const SelectiveScanParams& p, const Segment<State>& s, int64_t channel) {
    return p.C + s.row * p.C_batch_stride + s.first * p.C_token_stride +
           group(channel, p.c_groups, p.channels) * p.state_size;
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
        const float delta = dt[i * p.channels], dt_x = delta * x[i * p.channels];
        const Vec decay = exp(mul(broadcast(delta), A));
        state = rounded<State>(stepped<true>(state, decay, delta, dt_x, load_n(B + i * token, lanes)));
    }
    return state;
}

// Whether all channels of a segment use the same B and C.
template <typename State>
inline bool have_one_group(const SelectiveScanParams& p, const Segment<State>& s) {
    const int64_t last = s.channel + s.count - 1;
    return group(s.channel, p.b_groups, p.channels) == group(last, p.b_groups, p.channels) &&
           group(s.channel, p.c_groups, p.channels) == group(last, p.c_groups, p.channels);
}

// Whether sixteen states of sixteen channels can go through a segment by recur_by_channels.
template <typename State>
inline bool lanes_are_channels(const SelectiveScanParams& p, const Segment<State>& s) {
    return s.end && !s.slots && !s.replayed && !s.kept && s.count == kLanes && p.state_size % kLanes == 0 &&
           have_one_group(p, s);
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
void recur_by_channels(const SelectiveScanParams& p, const Segment<State>& s, int64_t n, PerChannel& v) {
    alignas(64) float rows[kLanes][kLanes], A[kLanes][kLanes], states[kLanes][kLanes];
    for (int c = 0; c < kLanes; c++) store(rows[c], load(p.A + (s.channel + c) * p.state_size + n));
    transpose(rows[0], A[0]);
    for (int c = 0; c < kLanes; c++) store(rows[c], load(s.start + c * p.state_size + n));
    transpose(rows[0], states[0]);
    const float *B = B_of(p, s, s.channel) + n, *C = C_of(p, s, s.channel) + n;
    for (int64_t t = 0; t < s.tokens; t++, B += p.B_token_stride, C += p.C_token_stride) {
        const Vec delta = load(v.dt[t]), delta_x = load(v.dt_x[t]);
        const auto product = [&](int i) {
            const Vec state = load(states[i]), decay = exp(mul(delta, load(A[i])));
            const Vec next = fma(decay, state, mul(delta_x, broadcast(B[i])));
            const Vec kept = rounded<State>(if_zero(delta, state, next));
            store(states[i], kept);
            return mul(kept, broadcast(C[i]));
        };
        store(v.y[t], add(load(v.y[t]), add_states<0, 1>(product)));
    }
    transpose(states[0], rows[0]);
    for (int c = 0; c < kLanes; c++) store(s.end + c * p.state_size + n, load(rows[c]));
}

// Where the states of a segment's channels lie, for states from some n on: so far apart from channel to channel, and,
// for those that the recurrence gives, from token to token.
template <typename State>
struct States {
    const State* start;
    int64_t start_stride;
    State* slots;
    int64_t channel_stride, slot_stride;
};

// States n … of `Together` channels from c on, which use one group, through the tokens of a segment: sixteen
// if `Whole`. Δ is zero somewhere if `Waits`. Sets products[t] to what each channel adds to y.
template <int Together, bool Whole, bool Waits, bool Lines, typename State>
inline void recur_by_states(const SelectiveScanParams& p, const Segment<State>& s, const States<State>& states,
                            int64_t n, const PerChannel& v, int64_t c, Vec (*products)[kLanes]) {
    const int64_t lanes = Whole ? kLanes : p.state_size - n, tokens = s.tokens;
    const int64_t B_stride = p.B_token_stride, C_stride = p.C_token_stride;
    const int64_t slot_stride = states.slot_stride, channel_stride = states.channel_stride;
    const float *B = B_of(p, s, s.channel + c) + n, *C = C_of(p, s, s.channel + c) + n;
    State* slot = states.slots + c * channel_stride;
    Vec A[Together], state[Together], decay[Together];
    for (int i = 0; i < Together; i++) {
        A[i] = load_n(p.A + (s.channel + c + i) * p.state_size + n, lanes);
        state[i] = load_n(states.start + (c + i) * states.start_stride, lanes);
    }
    for (int64_t t = 0; t < tokens; t++, slot += slot_stride, B += B_stride, C += C_stride) {
        const float *dt = v.dt[t] + c, *dt_x = v.dt_x[t] + c;
        for (int i = 0; i < Together; i++) decay[i] = exp(mul(broadcast(dt[i]), A[i]));
        for (int i = 0; i < Together; i++) {
            const Vec next = stepped<Waits>(state[i], decay[i], dt[i], dt_x[i], load_n(B, lanes));
            state[i] = rounded<State>(next);                      // what a call that starts here would read
            if (!Whole) state[i] = first_lanes(state[i], lanes);  // another could hold infinity times zero
            products[t][c + i] = mul(state[i], load_n(C, lanes));
            State* const to = slot + i * channel_stride;
            Lines ? store_line(to, next) : store_n(to, next, lanes);  // rounds alike, and the work is shared
        }
    }
}

// The same for all channels of a segment; several chains of operations overlap.
template <bool Whole, bool Waits, bool Lines = false, typename State>
void recur_by_states(const SelectiveScanParams& p, const Segment<State>& s, const States<State>& states, int64_t n,
                     const PerChannel& v, Vec (*products)[kLanes]) {
    constexpr int kTogether = 4;
    int64_t c = 0;
    if (Whole && have_one_group(p, s))
        for (; c + kTogether <= s.count; c += kTogether)
            recur_by_states<kTogether, Whole, Waits, Lines>(p, s, states, n, v, c, products);
    for (; c < s.count; c++) recur_by_states<1, Whole, Waits, Lines>(p, s, states, n, v, c, products);
}

// Whether a call writes many slots, in whole lines.
template <typename State>
bool slots_are_lines(const SelectiveScanParams& p) {
    const auto whole = [](int64_t count) { return count * sizeof(float) % kLineBytes == 0; };
    return sizeof(State) == sizeof(float) && reinterpret_cast<uintptr_t>(p.states) % kLineBytes == 0 &&
           whole(p.state_size) && whole(p.states_slot_stride) && whole(p.states_batch_stride) &&
           p.batch * p.tokens * p.channels * p.state_size * static_cast<int64_t>(sizeof(float)) >= kManyBytes;
}

// All states through the tokens of a segment; adds to y.
template <typename State>
void recur(const SelectiveScanParams& p, const Segment<State>& s, PerChannel& v) {
    const bool by_channels = lanes_are_channels(p, s);
    for (int64_t n = 0; n < p.state_size; n += kLanes) {
        if (by_channels) {
            recur_by_channels(p, s, n, v);
            continue;
        }
        const int64_t lanes = min(kLanes, p.state_size - n);
        State replayed[kLanes][kLanes], unused[kLanes];
        States<State> states{s.start + n, p.state_size, unused, 0, 0};
        if (s.slots) states.slots = s.slots + n, states.slot_stride = p.states_slot_stride;
        else if (s.end) states.slots = s.end + n;
        if (s.slots || s.end) states.channel_stride = p.state_size;
        if (s.replayed || s.kept) {
            for (int64_t c = 0; c < s.count; c++) {
                const Vec A = load_n(p.A + (s.channel + c) * p.state_size + n, lanes);
                const Vec state =
                    replay(p, s, s.channel + c, n, lanes, A, load_n(states.start + c * p.state_size, lanes));
                if (s.kept) store_n(s.kept + n + c * p.state_size, state, lanes);
                store(replayed[c], state);
            }
            states.start = replayed[0], states.start_stride = kLanes;
        }
        Vec products[kSegment][kLanes];
        if (lanes < kLanes) recur_by_states<false, true>(p, s, states, n, v, products);
        else if (v.waits) recur_by_states<true, true>(p, s, states, n, v, products);
        else if (s.slots && slots_are_lines<State>(p)) recur_by_states<true, false, true>(p, s, states, n, v, products);
        else recur_by_states<true, false>(p, s, states, n, v, products);
        for (int64_t t = 0; t < s.tokens; t++) {
            for (int64_t c = s.count; c < kLanes; c++) products[t][c] = zero();
            store(v.y[t], add(load(v.y[t]), add_lanes(products[t])));
        }
    }
}

// What is per channel: all that the recurrence takes in, and the gate of what it gives.
template <typename State>
void prepare(const SelectiveScanParams& p, const Segment<State>& s, PerChannel& v) {
    const int64_t left_padding = p.left_padding ? p.left_padding[s.row] : 0;
    const float* x = p.x + s.row * p.x_batch_stride + s.first * p.x_token_stride + s.channel;
    const float* raw_dt = p.dt + s.row * p.dt_batch_stride + s.first * p.dt_token_stride + s.channel;
    const float* z = p.z ? p.z + s.row * p.z_batch_stride + s.first * p.z_token_stride + s.channel : nullptr;
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
    bool waits = false;
    for (int64_t t = 0; t < s.tokens; t++) {
        prefetch(s.first + later + t, s.channel + ahead);
        const Vec input = load_n(x + t * p.x_token_stride, s.count);
        Vec delta = softplus(add(load_n(raw_dt + t * p.dt_token_stride, s.count), dt_bias));
        if (s.first + t < left_padding) delta = zero();
        waits |= any_equal(delta, zero());
        store(v.dt[t], delta);
        store(v.dt_x[t], mul(delta, input));
        store(v.y[t], mul(skip, input));
        if (z) store(v.gate[t], silu(load_n(z + t * p.z_token_stride, s.count)));
    }
    v.waits = waits;
}

template <typename State>
void finish(const SelectiveScanParams& p, const Segment<State>& s, const PerChannel& v) {
    for (int64_t t = 0; t < s.tokens; t++) {
        const Vec out = p.z ? mul(load(v.y[t]), load(v.gate[t])) : load(v.y[t]);
        store_n(p.y + (s.row * p.tokens + s.first + t) * p.channels + s.channel, out, s.count);
    }
    if (!p.input_dt || p.final_state_only) return;
    const float* x = p.x + s.row * p.x_batch_stride + s.first * p.x_token_stride + s.channel;
    for (int64_t t = 0; t < s.tokens; t++) {
        const int64_t input = (s.row * p.input_slots + p.write_slot + s.first + t) * p.channels + s.channel;
        store_n(p.input_x + input, load_n(x + t * p.x_token_stride, s.count), s.count);
        store_n(p.input_dt + input, load(v.dt[t]), s.count);
    }
}

template <typename State>
void segment(const SelectiveScanParams& p, const Segment<State>& s) {
    PerChannel values;
    prepare(p, s, values);
    recur(p, s, values);
    finish(p, s, values);
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
        lines_stored();
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
