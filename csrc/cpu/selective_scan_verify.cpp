// Lanes run over channels for what is per channel (softplus, gate) and over states for the recurrence, whose state
// stays in registers for up to kSegment tokens.
#include "../params.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {
namespace {

constexpr int kSegment = 16;

template <typename State>
struct Segment {
    int64_t row, channel, count;  // up to sixteen channels of one row
    int64_t first, tokens;        // tokens [first, first + tokens) of the window
    const State* start;           // (D, N): state before the first token
};

// Where token t of the window leaves its state; null when nobody will start from it.
template <typename State>
inline State* checkpoint(const SelectiveScanParams& p, int64_t row, int64_t t, int64_t segment_end) {
    State* states = static_cast<State*>(p.states) + row * p.states_batch_stride;
    if (!p.keep_last) return states + (p.write_slot + t) * p.states_slot_stride;
    return t + 1 == segment_end ? states : nullptr;
}

template <typename State>
void segment(const SelectiveScanParams& p, const Segment<State>& s) {
    alignas(64) float dt[kSegment][kLanes], dt_x[kSegment][kLanes], y[kSegment][kLanes];
    const int64_t null_columns = p.null_columns ? p.null_columns[s.row] : 0;
    const float* x = p.x + s.row * p.x_batch_stride + s.first * p.x_token_stride + s.channel;
    const float* raw_dt = p.dt + s.row * p.dt_batch_stride + s.first * p.dt_token_stride + s.channel;
    const float* B = p.B + s.row * p.b_batch_stride + s.first * p.b_token_stride;
    const float* C = p.C + s.row * p.c_batch_stride + s.first * p.c_token_stride;

    const Vec dt_bias = load_n(p.dt_bias + s.channel, s.count), skip = load_n(p.D + s.channel, s.count);
    for (int64_t t = 0; t < s.tokens; t++) {
        Vec input = load_n(x + t * p.x_token_stride, s.count);
        Vec step = softplus(add(load_n(raw_dt + t * p.dt_token_stride, s.count), dt_bias));
        store(dt[t], step);
        store(dt_x[t], mul(step, input));
        store(y[t], mul(skip, input));
    }
    for (int64_t n = 0; n < p.state_size; n += kLanes) {
        const int64_t lanes = smaller(kLanes, p.state_size - n);
        for (int64_t c = 0; c < s.count; c++) {
            const int64_t offset = (s.channel + c) * p.state_size + n;
            const Vec A = load_n(p.A + offset, lanes);
            Vec state = load_n(s.start + offset, lanes);
            for (int64_t t = 0; t < s.tokens; t++) {
                Vec next = state;
                if (s.first + t >= null_columns) {
                    Vec decay = exp(mul(broadcast(dt[t][c]), A));
                    next = fma(decay, state, mul(broadcast(dt_x[t][c]), load_n(B + t * p.b_token_stride + n, lanes)));
                }
                state = rounded<State>(next);  // what a call that starts here would read
                y[t][c] += sum(mul(state, load_n(C + t * p.c_token_stride + n, lanes)));
                State* out = checkpoint<State>(p, s.row, s.first + t, s.first + s.tokens);
                if (out) store_n(out + offset, next, lanes);  // rounds alike, and the work is shared
            }
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
}

template <typename State>
void channel_block(const SelectiveScanParams& p, int64_t row, int64_t channel, int64_t count) {
    const State* states = static_cast<const State*>(p.states) + row * p.states_batch_stride;
    const State* start = states + p.start_slot[row] * p.states_slot_stride;
    for (int64_t first = 0; first < p.tokens; first += kSegment) {
        const int64_t tokens = smaller(kSegment, p.tokens - first);
        segment<State>(p, {row, channel, count, first, tokens, start});
        start = checkpoint<State>(p, row, first + tokens - 1, first + tokens);
    }
}

template <typename State>
void run(const SelectiveScanParams& p, int threads) {
    const int64_t blocks = divide_up(p.channels, kLanes), items = p.batch * blocks;
    const int64_t work = items * p.tokens * kLanes * divide_up(p.state_size, kLanes) * 64;
    parallel_for(items, divide_up(items, 4 * threads), work, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            int64_t channel = i % blocks * kLanes;
            channel_block<State>(p, i / blocks, channel, smaller(kLanes, p.channels - channel));
        }
    });
}

}  // namespace

void selective_scan(const SelectiveScanParams& p, int threads) {
    SM_DISPATCH_DTYPE(p.state_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
