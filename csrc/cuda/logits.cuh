// Where the logits of a position lie, how they are ordered, and what becomes of them when they say nothing.
#pragma once

#include "block.cuh"

namespace speculative_mamba::cuda {
namespace {

// Places order logits: the likelier, the smaller. Zeros of both signs share one, and NaN comes first.
__device__ __forceinline__ uint32_t place_of(float logit) {
    if (logit != logit) return 0;
    const float value = logit + 0.f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float logit_at(uint32_t place) {
    const uint32_t bits = place & 0x80000000u ? place : ~place & 0x7fffffffu;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

// Why a row with this greatest logit has no law.
__device__ __forceinline__ Verdict verdict_on(float peak, bool greedy) {
    if (peak != peak) return Verdict::nan_logits;
    if (peak == -HUGE_VALF) return Verdict::no_token;
    return peak == HUGE_VALF && !greedy ? Verdict::infinite_logits : Verdict::ok;
}

// Logits of tokens that the text holds lose: divided by the penalty if positive, else multiplied (Keskar et al. 2019,
// CTRL).
__device__ __forceinline__ float penalised(float value, float penalty, bool in_text, const int64_t* recent,
                                           int64_t recent_tokens, int token) {
#pragma unroll 1
    for (int64_t i = 0; i < recent_tokens; i++) in_text |= load_raw(recent + i) == token;
    return !in_text ? value : value > 0 ? value / penalty : value * penalty;
}

struct Logits {
    const float* values;  // (V)
    int vocabulary;
    float penalty;
    const bool* seen;       // (V): tokens of the text; read only with a penalty
    const int64_t* recent;  // further tokens of the text
    int64_t recent_tokens;

    __device__ float operator[](int token) const { return adjusted(token, load(values + token)); }
    __device__ float adjusted(int token, float value) const {
        if (penalty == 1.f) return value;
        return penalised(value, penalty, load_raw(seen + token), recent, recent_tokens, token);
    }
};

// Memory of a position between launches.
constexpr int kChunk = 2048;
inline __host__ __device__ int64_t chunks_of(int64_t vocabulary) { return (vocabulary + kChunk - 1) / kChunk; }
inline __host__ __device__ int64_t scratch_of(int64_t vocabulary) {
    return (vocabulary + 63) / 64 + 4 * chunks_of(vocabulary) + kBins + 1;
}
struct Scratch {
    uint64_t* memory;  // (⌈V / 64⌉ + 4 ⌈V / 2048⌉ + 2049)
    int vocabulary;

    __device__ uint64_t* leaders() const { return memory; }                              // (⌈V / 512⌉) of spans, or
    __device__ uint32_t* places() const { return reinterpret_cast<uint32_t*>(memory); }  // (⌈V / 32⌉) of groups
    __device__ uint64_t* totals() const { return memory + (vocabulary + 63) / 64; }      // (⌈V / 2048⌉) of chunks
    __device__ uint64_t* winners() const { return totals() + chunks_of(vocabulary); }    // (⌈V / 2048⌉)
    __device__ uint64_t* rest() const { return winners() + chunks_of(vocabulary); }      // (⌈V / 2048⌉), of residuals
    __device__ uint64_t* met() const { return rest() + chunks_of(vocabulary); }          // (⌈V / 2048⌉)
    __device__ uint64_t* last() const { return met() + chunks_of(vocabulary); }          // (1): place and id
    __device__ unsigned* tally() const { return reinterpret_cast<unsigned*>(last() + 1); }  // (2 · kBins)
};

// A position of a row's window.
struct Position {
    Logits logits;
    float* law;  // (V): where to write it; may be null
    Scratch scratch;
};

__device__ __forceinline__ Position position_of(const SampleTokensParams& p, int64_t row, int64_t) {
    const Logits logits{p.logits + row * p.logits_batch_stride, static_cast<int>(p.vocabulary),
                        p.filters.repetition_penalty,           p.seen + row * p.vocabulary,
                        p.recent + row * p.recent_tokens,       p.recent_tokens};
    return {logits,
            p.laws ? p.laws + row * p.laws_batch_stride : nullptr,
            {p.scratch + row * scratch_of(p.vocabulary), logits.vocabulary}};
}
__device__ __forceinline__ Position position_of(const SpeculativeAcceptParams& p, int64_t row, int64_t t) {
    const float* values = p.logits + row * p.logits_batch_stride + t * p.logits_token_stride;
    const Logits logits{values,
                        static_cast<int>(p.vocabulary),
                        p.filters.repetition_penalty,
                        p.seen + row * p.vocabulary,
                        p.drafted + row * (p.tokens - 1),
                        t};
    return {logits, nullptr, {p.scratch + (row * p.tokens + t) * scratch_of(p.vocabulary), logits.vocabulary}};
}

template <typename Params>
__device__ __forceinline__ bool is_active(const Params& p, int64_t row) {
    return !p.active || load_raw(p.active + row);
}

}  // namespace
}  // namespace speculative_mamba::cuda
