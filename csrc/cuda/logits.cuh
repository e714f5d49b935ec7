// The logits of a position: where they lie, how they are ordered, and a first launch over all of them, which adds bias
// and penalties where a row has any and leaves little to read for the next.
#pragma once

#include "block.cuh"

namespace speculative_mamba::cuda {
namespace {

// Sort keys order logits: the likelier, the min. Zeros of both signs share one, and NaN comes first.
__device__ __forceinline__ uint32_t sort_key(float logit) {
    if (logit != logit) return 0;
    const float value = logit + 0.f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float logit_of(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key : ~key & 0x7fffffffu;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

// A token with its sort key, as a number: the least of several is the likeliest, of equals the lowest id.
__device__ __forceinline__ uint64_t packed(uint32_t key, int token) {
    return static_cast<uint64_t>(key) << 32 | static_cast<unsigned>(token);
}
__device__ __forceinline__ uint32_t key_of(uint64_t packed) { return static_cast<uint32_t>(packed >> 32); }
__device__ __forceinline__ int token_of(uint64_t packed) { return static_cast<int>(packed & 0xffffffffu); }

constexpr int kGroup = 32, kSpan = 512;  // tokens of which the least key is kept, and the likeliest
constexpr int kReduceThreads = 128, kChunk = kReduceThreads / kWarp * kSpan, kQuads = kSpan / kWarp / 4;

// The parameters of a row.
struct RowSampling {
    float temperature, top_p, min_p;
    int top_k;

    __device__ RowSampling(const SamplingTensors& s, int64_t row)
        : temperature(load(s.temperature + row)),
          top_p(load(s.top_p + row)),
          min_p(load(s.min_p + row)),
          top_k(load_raw(s.top_k + row)) {}
    __device__ bool greedy() const { return temperature == 0.f; }
};
struct RowPenalties {
    float repetition = 1.f, presence = 0.f, frequency = 0.f;

    __device__ RowPenalties(const SamplingTensors& s, int64_t row) {
        if (!s.repetition_penalty) return;
        repetition = load(s.repetition_penalty + row);
        presence = load(s.presence_penalty + row);
        frequency = load(s.frequency_penalty + row);
    }
    __device__ bool any() const { return repetition != 1.f || presence != 0.f || frequency != 0.f; }
};
__device__ __forceinline__ bool is_biased(const SamplingTensors& s, int64_t row) {
    return s.bias_capacity > 0 && load_raw(s.bias_ids + row * s.bias_capacity) >= 0;
}

// Memory between launches, in words, of a position without its decision and its adjusted logits.
inline __host__ __device__ int64_t spans_of(int64_t vocabulary) { return (vocabulary + kSpan - 1) / kSpan; }
inline __host__ __device__ int64_t words_of(int64_t vocabulary) {
    return (vocabulary + 63) / 64 + spans_of(vocabulary);
}
// (K+1) of a row: what its positions decide. Behind the words of all positions.
__device__ __forceinline__ int64_t* decisions_of(const SpeculativeAcceptParams& p, int64_t row) {
    return reinterpret_cast<int64_t*>(p.scratch) + p.batch * p.tokens * words_of(p.vocabulary) + row * p.tokens;
}
// (V) of a position: its logits after bias and penalties, of a row that has any. Behind all decisions.
__device__ __forceinline__ float* adjusted_of(const SpeculativeAcceptParams& p, int64_t row, int64_t t) {
    return reinterpret_cast<float*>(decisions_of(p, p.batch)) + (row * p.tokens + t) * p.vocabulary;
}

// A position of a row's window.
struct Position {
    int64_t row, t;
    int vocabulary;
    const float* logits;  // (V): those that count
    uint64_t* max;        // (⌈V / 512⌉): the likeliest token of every span
    uint32_t* keys;       // (⌈V / 32⌉): the least key of every group; read only where a row is sampled

    __device__ Position(const SpeculativeAcceptParams& p, int64_t row, int64_t t)
        : row(row), t(t), vocabulary(static_cast<int>(p.vocabulary)) {
        const bool adjusted = RowPenalties(p.sampling, row).any() || is_biased(p.sampling, row);
        logits = adjusted ? adjusted_of(p, row, t) : p.logits + row * p.logits_batch_stride + t * p.logits_token_stride;
        max = p.scratch + (row * p.tokens + t) * words_of(vocabulary);
        keys = reinterpret_cast<uint32_t*>(max + spans());
    }
    __device__ int spans() const { return static_cast<int>(spans_of(vocabulary)); }
    __device__ int groups() const { return (vocabulary + kGroup - 1) / kGroup; }
};

// How many of the row's drafted tokens count.
__device__ __forceinline__ int64_t lookahead_of(const SpeculativeAcceptParams& p, int64_t row) {
    const int64_t lookahead = p.tokens - 1;
    return p.num_draft_tokens ? Min{}(int64_t{load_raw(p.num_draft_tokens + row)}, lookahead) : lookahead;
}
__device__ __forceinline__ bool is_active(const SpeculativeAcceptParams& p, int64_t row) {
    return !p.active || load_raw(p.active + row);
}

// The bias of a block's chunk of tokens, and how often the window has each before position t.
struct Adjustments {
    unsigned* counts;  // (kChunk)
    float* bias;       // (kChunk)
    int first;
    RowPenalties penalties;

    __device__ void gather(const SpeculativeAcceptParams& p, int64_t row, int64_t t) const {
        for (int i = static_cast<int>(threadIdx.x); i < kChunk; i += kReduceThreads) {
            store_raw(counts + i, 0u);
            store_raw(bias + i, 0.f);
        }
        __syncthreads();
        const SamplingTensors& s = p.sampling;
        auto contains = [&](int64_t at) { return 0 <= at && at < kChunk; };
        for (int64_t i = threadIdx.x; i < s.bias_capacity; i += kReduceThreads) {
            const int64_t token = load_raw(s.bias_ids + row * s.bias_capacity + i), at = token - first;
            if (token >= 0 && contains(at)) store_raw(bias + at, load(s.bias_values + row * s.bias_capacity + i));
        }
        const int64_t drafted = p.draft_stride - (p.tokens - 1) + t;
        for (int64_t i = threadIdx.x; i < drafted; i += kReduceThreads) {
            const int64_t at = load_raw(p.draft_tokens + row * p.draft_stride + i) - first;
            if (contains(at)) add_atomically(counts + at, 1u);
        }
        __syncthreads();
    }
    // prompt_mask, output_counts: (V) of the row.
    __device__ float operator()(float logit, int token, const bool* prompt_mask, const int32_t* output_counts) const {
        float value = logit + load(bias + token - first);
        if (!penalties.any()) return value;
        const int32_t count = load_raw(output_counts + token) + static_cast<int32_t>(load_raw(counts + token - first));
        const bool generated = count > 0;
        if (generated || load_raw(prompt_mask + token))
            value = value > 0 ? value / penalties.repetition : value * penalties.repetition;
        return generated ? value - penalties.frequency * static_cast<float>(count) - penalties.presence : value;
    }
};

// A warp takes a span of a position's tokens. Probabilities are filled with zeros, which most of them are.
__global__ void __launch_bounds__(kReduceThreads, 4) reduce_logits(SpeculativeAcceptParams p) {
    SM_SHARED(unsigned, counts, kChunk);
    SM_SHARED(float, bias, kChunk);
    wait_for_previous();
    const int64_t row = blockIdx.y, t = blockIdx.z;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, vocabulary = static_cast<int>(p.vocabulary);
    const int span = static_cast<int>(blockIdx.x * (kReduceThreads / kWarp) + threadIdx.x / kWarp);
    auto first_of = [&](int quad) { return span * kSpan + (quad * kWarp + lane) * 4; };
    auto count_of = [&](int quad) { return Min{}(vocabulary - first_of(quad), 4); };
    Float4 quads[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; q++)
        quads[q] = load4(p.logits + row * p.logits_batch_stride + t * p.logits_token_stride + first_of(q), count_of(q));
    if (!is_active(p, row) || t > lookahead_of(p, row)) return;
    const Position position(p, row, t);
    const Adjustments adjust{counts, bias, static_cast<int>(blockIdx.x) * kChunk, RowPenalties(p.sampling, row)};
    if (adjust.penalties.any() || is_biased(p.sampling, row)) {
        adjust.gather(p, row, t);
        float* out = adjusted_of(p, row, t);
#pragma unroll
        for (int q = 0; q < kQuads; q++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i >= count_of(q)) continue;
                quads[q].v[i] = adjust(quads[q].v[i], first_of(q) + i, p.prompt_mask + row * p.vocabulary,
                                       p.output_counts + row * p.vocabulary);
            }
            store4(out + first_of(q), quads[q], count_of(q));
        }
    }
    if (span >= position.spans()) return;
    uint64_t max = ~uint64_t{0};
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
        uint32_t min_key = ~0u;
        int token = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t key = sort_key(quads[q].v[i]);
            if (i < count_of(q) && key < min_key) min_key = key, token = first_of(q) + i;
        }
        max = Min{}(max, packed(min_key, token));
        if (p.target_probs)
            store4(p.target_probs + row * p.target_probs_batch_stride + first_of(q), Float4{}, count_of(q));
        min_key = warp_reduce<kGroup / 4>(min_key, Min{});
        if (lane % (kGroup / 4) == 0 && count_of(q) > 0) store_raw(position.keys + first_of(q) / kGroup, min_key);
    }
    max = warp_reduce<kWarp>(max, Min{});
    if (lane == 0) store_raw(position.max + span, max);
}

inline void launch_reduce_logits(const SpeculativeAcceptParams& p, cudaStream_t stream) {
    const dim3 blocks(blocks_for(p.vocabulary, kChunk), static_cast<unsigned>(p.batch),
                      static_cast<unsigned>(p.tokens));
    launch(reduce_logits, blocks, dim3(kReduceThreads), stream, p);
}

// The likeliest token of a position, by a block.
__device__ __forceinline__ uint64_t packed_max(const BlockMemory& m, const Position& position) {
    uint64_t max = ~uint64_t{0};
    for_each(
        position.spans(), [&](int i) { return load_raw(position.max + i); },
        [&](int, uint64_t other) { max = Min{}(max, other); });
    return block_reduce(m, max, Min{});
}

// Why no token can be chosen from logits of which this is the running_max.
__device__ __forceinline__ RowStatus status_of(float peak, bool greedy) {
    if (peak != peak) return RowStatus::nan_logits;
    if (peak == -HUGE_VALF) return RowStatus::no_token;
    return peak == HUGE_VALF && !greedy ? RowStatus::infinite_logits : RowStatus::ok;
}

}  // namespace
}  // namespace speculative_mamba::cuda
