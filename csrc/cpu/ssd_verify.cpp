// Lanes run over states. Up to sixteen channels of a head go through up to kSegment steps at a time, each channel with
// its states in registers; lanes run over steps or channels for what does not depend on the state.
#include "../params.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {
namespace {

constexpr int kSegment = kLanes;
constexpr int kVectors = 8;  // of states in registers
constexpr int kPiece = kVectors * kLanes;

struct Block {
    int64_t row, head, channel, count;  // up to sixteen channels of one head
    int64_t replayed;                   // old inputs that lead to the start state
};

// Steps [first, first + count) of a head's sequence, with states [n, n + size): first the old inputs, then the new
// tokens.
struct Segment {
    int64_t row = -1, head, first, n;
    int64_t count, old, size;                         // the first `old` steps are old inputs
    alignas(64) float dt[kSegment], decay[kSegment];  // Δ and exp(Δ A)
    const float *B[kSegment], *C[kSegment];           // full vectors
    alignas(64) float padded_b[kSegment][kPiece], padded_c[kSegment][kPiece];
    alignas(64) float dt_x[kSegment][kLanes], y[kSegment][kLanes];  // by channel of a block
};

// Which of `groups` serves a head.
inline int64_t group_of(const SsdParams& p, int64_t head, int64_t groups) { return head / (p.heads / groups); }

inline Vec step_size(const SsdParams& p, Vec dt, Vec bias) {
    return max(broadcast(p.dt_min), min(broadcast(p.dt_max), softplus(add(dt, bias))));
}

inline bool is_padding(const SsdParams& p, int64_t row, int64_t token) {
    return p.left_padding && token < p.left_padding[row];
}

// Where x of a step lies, from the block's first channel on.
inline const float* x_of(const SsdParams& p, const Block& b, int64_t step) {
    const int64_t channel = group_of(p, b.head, p.x_heads) * p.head_size + b.channel;
    if (step < b.replayed) return p.input_x + (b.row * p.input_slots + step) * p.x_heads * p.head_size + channel;
    return p.x + b.row * p.x_batch_stride + (step - b.replayed) * p.x_token_stride + channel;
}

// `count` numbers as full vectors: where they lie, or, if the last vector would not be full, in `padded` with zeros.
const float* full_vectors(const float* from, int64_t count, float* padded) {
    if (count % kLanes == 0) return from;
    for (int64_t n = 0; n < count; n += kLanes) store(padded + n, load_n(from + n, min(kLanes, count - n)));
    return padded;
}

// What is the same for all channels of a head. Lanes run over steps for Δ, which every lane computes alike.
void fill(const SsdParams& p, const Block& b, int64_t first, int64_t n, Segment& s) {
    s.row = b.row, s.head = b.head, s.first = first, s.n = n;
    s.count = min(kSegment, b.replayed + p.tokens - first);
    s.old = first < b.replayed ? min(s.count, b.replayed - first) : 0;
    s.size = min(kPiece, p.state_size - n);
    const int64_t first_input = b.row * p.input_slots + first, first_token = first - b.replayed;

    float raw[kSegment] = {};
    const float* dt = p.dt + b.row * p.dt_batch_stride + b.head;
    for (int64_t i = s.old; i < s.count; i++) raw[i] = dt[(first_token + i) * p.dt_token_stride];
    store(s.dt, step_size(p, load(raw), broadcast(p.dt_bias[b.head])));
    for (int64_t i = 0; i < s.old; i++) s.dt[i] = p.input_dt[(first_input + i) * p.heads + b.head];
    for (int64_t i = s.old; i < s.count; i++) {
        if (is_padding(p, b.row, first_token + i)) s.dt[i] = 0;
    }
    store(s.decay, exp(mul(load(s.dt), broadcast(p.A[b.head]))));

    const int64_t b_offset = group_of(p, b.head, p.b_groups) * p.state_size + n;
    const int64_t c_offset = group_of(p, b.head, p.c_groups) * p.state_size + n;
    for (int64_t i = 0; i < s.count; i++) {
        if (i < s.old) {
            const float* B = p.input_B + (first_input + i) * p.b_groups * p.state_size;
            s.B[i] = full_vectors(B + b_offset, s.size, s.padded_b[i]);
        } else {
            const float* B = p.B + b.row * p.B_batch_stride + (first_token + i) * p.B_token_stride;
            const float* C = p.C + b.row * p.C_batch_stride + (first_token + i) * p.C_token_stride;
            s.B[i] = full_vectors(B + b_offset, s.size, s.padded_b[i]);
            s.C[i] = full_vectors(C + c_offset, s.size, s.padded_c[i]);
        }
    }
}

// Where the state after a step goes; null where nobody will start from it.
template <typename State>
inline State* slot_after(const SsdParams& p, const Block& b, int64_t step) {
    State* states = static_cast<State*>(p.states) + b.row * p.states_batch_stride;
    if (p.final_state_only) return step + 1 == b.replayed + p.tokens ? states : nullptr;
    if (p.input_dt) return step + 1 == b.replayed && p.write_slot == 0 ? states : nullptr;
    return states + (p.write_slot + step) * p.states_slot_stride;
}

template <typename T, int V>
inline void load_all(const T* from, int64_t tail, Vec (&state)[V]) {
    for (int v = 0; v < V - 1; v++) state[v] = load(from + v * kLanes);
    state[V - 1] = load_n(from + (V - 1) * kLanes, tail);
}

template <typename T, int V>
inline void store_all(T* to, int64_t tail, const Vec (&state)[V]) {
    for (int v = 0; v < V - 1; v++) store(to + v * kLanes, state[v]);
    store_n(to + (V - 1) * kLanes, state[V - 1], tail);
}

// Takes each channel of a block through the segment. The states of a long sequence wait in `carry` between its
// segments.
template <typename State, int V>
void scan(const SsdParams& p, const Block& b, Segment& s, float (*carry)[kPiece]) {
    for (int64_t i = 0; i < s.count; i++) {
        store(s.dt_x[i], mul(broadcast(s.dt[i]), load_n(x_of(p, b, s.first + i), b.count)));
        store(s.y[i], zero());
    }
    State* out[kSegment];
    for (int64_t i = 0; i < s.count; i++) out[i] = slot_after<State>(p, b, s.first + i);
    const State* start = static_cast<const State*>(p.states) + b.row * p.states_batch_stride;
    if (!p.input_dt) start += p.start_slot[b.row] * p.states_slot_stride;
    const bool last = s.first + s.count == b.replayed + p.tokens;
    const int64_t tail = s.size - (V - 1) * kLanes;

    int64_t offset = (b.head * p.head_size + b.channel) * p.state_size + s.n;
    for (int64_t c = 0; c < b.count; c++, offset += p.state_size) {
        Vec state[V];
        if (s.first == 0) {
            load_all(start + offset, tail, state);
        } else {
            load_all(carry[c], kLanes, state);
        }
        for (int64_t i = 0; i < s.count; i++) {
            if (s.dt[i] != 0) {  // else the state stays as it was, to the bit
                const Vec decay = broadcast(s.decay[i]), dt_x = broadcast(s.dt_x[i][c]);
                for (int v = 0; v < V; v++) {
                    // What a call that starts here would read.
                    state[v] = rounded<State>(fma(decay, state[v], mul(dt_x, load(s.B[i] + v * kLanes))));
                }
                // Another lane could hold infinity times zero.
                if (tail < kLanes) state[V - 1] = first_lanes(state[V - 1], tail);
            }
            if (i >= s.old) {
                Vec products = mul(state[0], load(s.C[i]));
                for (int v = 1; v < V; v++) products = fma(state[v], load(s.C[i] + v * kLanes), products);
                s.y[i][c] = sum(products);
            }
            if (out[i]) store_all(out[i] + offset, tail, state);
        }
        if (!last) store_all(carry[c], kLanes, state);
    }
}

template <typename State, int V = kVectors>
void scan_piece(const SsdParams& p, const Block& b, Segment& s, float (*carry)[kPiece]) {
    if constexpr (V > 1) {
        if (s.size <= (V - 1) * kLanes) return scan_piece<State, V - 1>(p, b, s, carry);
    }
    scan<State, V>(p, b, s, carry);
}

// Adds what a piece of the states gives to y; the first comes with D x, the last with the gate.
void add_to_y(const SsdParams& p, const Block& b, const Segment& s) {
    const bool gate = p.z && s.n + s.size == p.state_size;
    const int64_t channel = b.head * p.head_size + b.channel;
    const Vec skip = p.d_per_channel ? load_n(p.D + channel, b.count) : broadcast(p.D[b.head]);
    for (int64_t i = s.old; i < s.count; i++) {
        const int64_t token = s.first + i - b.replayed;
        float* y = p.y + (b.row * p.tokens + token) * p.heads * p.head_size + channel;
        Vec before = s.n == 0 ? mul(skip, load_n(x_of(p, b, s.first + i), b.count)) : load_n(y, b.count);
        Vec out = add(before, load(s.y[i]));
        if (gate) {
            const float* z = p.z + b.row * p.z_batch_stride + token * p.z_token_stride + channel;
            out = mul(out, silu(load_n(z, b.count)));
        }
        store_n(y, out, b.count);
    }
}

template <typename State>
void channel_block(const SsdParams& p, const Block& b, Segment& s) {
    if (p.start_slot[b.row] < 0) {
        const int64_t channels = p.heads * p.head_size, channel = b.head * p.head_size + b.channel;
        return store_zeros(p.y + b.row * p.tokens * channels + channel, p.tokens, channels, b.count);
    }
    alignas(64) float carry[kLanes][kPiece];
    for (int64_t n = 0; n < p.state_size; n += kPiece) {
        for (int64_t first = 0; first < b.replayed + p.tokens; first += kSegment) {
            // Mostly it is still there from the head's block before.
            if (s.row != b.row || s.head != b.head || s.first != first || s.n != n) fill(p, b, first, n, s);
            scan_piece<State>(p, b, s, carry);
            add_to_y(p, b, s);
        }
    }
}

// Leaves a new token as the input of its slot. After prefill the kept state holds it already: slot 0 adds nothing.
void remember(const SsdParams& p, int64_t row, int64_t token) {
    if (p.start_slot[row] < 0 || (p.final_state_only && token > 0)) return;
    const int64_t input = row * p.input_slots + p.write_slot + token;
    const float* dt = p.dt + row * p.dt_batch_stride + token * p.dt_token_stride;
    const bool nothing = p.final_state_only || is_padding(p, row, token);
    for (int64_t h = 0; h < p.heads; h += kLanes) {
        const int64_t count = min(kLanes, p.heads - h);
        Vec step = nothing ? zero() : step_size(p, load_n(dt + h, count), load_n(p.dt_bias + h, count));
        store_n(p.input_dt + input * p.heads + h, step, count);
    }
    if (p.final_state_only) return;
    const int64_t x_size = p.x_heads * p.head_size, b_size = p.b_groups * p.state_size;
    std::memcpy(p.input_x + input * x_size, p.x + row * p.x_batch_stride + token * p.x_token_stride,
                x_size * sizeof(float));
    std::memcpy(p.input_B + input * b_size, p.B + row * p.B_batch_stride + token * p.B_token_stride,
                b_size * sizeof(float));
}

template <typename State>
void run(const SsdParams& p, int threads) {
    const int64_t blocks = divide_up(p.head_size, kLanes), items = p.batch * p.heads * blocks;
    const int64_t work = 2 * items * kLanes * p.tokens * p.state_size;
    parallel_for(items, divide_up(items, 4 * threads), work, threads, [&](int64_t first, int64_t last) {
        Segment s;
        for (int64_t i = first; i < last; i++) {
            const int64_t row = i / blocks / p.heads, head = i / blocks % p.heads, channel = i % blocks * kLanes;
            const int64_t inputs = p.write_slot == 0 ? p.start_slot[row] + 1 : p.write_slot;
            const int64_t replayed = p.input_dt ? inputs : 0;
            channel_block<State>(p, {row, head, channel, min(kLanes, p.head_size - channel), replayed}, s);
        }
    });
    if (!p.input_dt) return;
    // Only now: blocks of several heads read the same old inputs.
    const int64_t tokens = p.batch * p.tokens, copied = tokens * (p.x_heads * p.head_size + 32 * p.heads);
    parallel_for(tokens, divide_up(tokens, 4 * threads), copied, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) remember(p, i / p.tokens, i % p.tokens);
    });
}

}  // namespace

void ssd_verify(const SsdParams& p, int threads) { SM_DISPATCH_DTYPE(p.states_dtype, run<scalar_t>(p, threads)); }

}  // namespace speculative_mamba::SM_ISA
