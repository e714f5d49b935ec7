// Weights of tokens, and top-k candidates: a few tokens of a position in order, of which a thread of the block takes
// one.
#pragma once

#include "logits.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr float kSmallest = -87.f;  // weights of exp(-87) and below count as 0

// A weight, of at most 1, in fixed point.
constexpr float kUnits = 0x1p42f;
__device__ __forceinline__ uint64_t to_units(float weight) { return static_cast<uint64_t>(weight * kUnits); }
// What makes a weight a probability.
__device__ __forceinline__ float scale_of(uint64_t total) {
    return static_cast<float>(static_cast<double>(kUnits) / static_cast<double>(total));
}

struct Weights {
    float peak, temperature;

    __device__ float operator()(float logit) const {
        const float scaled = (logit - peak) / temperature;
        return scaled > kSmallest ? expf(scaled) : 0.f;
    }
    // The likelier, the min; kBins where the weight is 0.
    __device__ int bin(float logit) const {
        const float bin = (peak - logit) * (kBins / (1.f - kSmallest) / temperature);
        return bin < kBins ? static_cast<int>(bin) : kBins;
    }
};

constexpr int kMaxCandidates = 512;

struct Candidates {
    unsigned *count, *num_groups;
    int* groups;                // (kMaxCandidates): groups that may have a candidate
    uint64_t *found, *units;    // (kMaxCandidates): tokens as they come, and what they count
    uint64_t *sorted, *before;  // (kMaxCandidates), (kMaxCandidates + 1): in order, and what those before each count

    __device__ void clear() const {
        __syncthreads();
        if (threadIdx.x == 0) {
            store_raw(count, 0u);
            store_raw(num_groups, 0u);
        }
        __syncthreads();
    }
    // By any thread; what is beyond kMaxCandidates is counted only.
    __device__ void add(int token, float logit, uint64_t counts) const {
        const unsigned at = add_atomically(count, 1);
        if (at >= kMaxCandidates) return;
        store_raw(found + at, packed(sort_key(logit), token));
        store_raw(units + at, counts);
    }
    __device__ void add_group(int group) const {
        const unsigned at = add_atomically(num_groups, 1);
        if (at < kMaxCandidates) store_raw(groups + at, group);
    }
    __device__ int size() const {
        __syncthreads();
        return static_cast<int>(load_raw(count));
    }
    // Puts the tokens in order.
    __device__ void sort(int size) const {
        if (static_cast<int>(threadIdx.x) < size) {
            const uint64_t mine = load_raw(found + threadIdx.x), counts = load_raw(units + threadIdx.x);
            int rank = 0;
            uint64_t sum = 0;
#pragma unroll 8
            for (int i = 0; i < size; i++) {
                const uint64_t other = load_raw(found + i), its = load_raw(units + i);
                if (other < mine) rank++, sum += its;
            }
            store_raw(sorted + rank, mine);
            store_raw(before + rank, sum);
            if (rank + 1 == size) store_raw(before + size, sum + counts);
        }
        __syncthreads();
    }
};
#define SM_CANDIDATES(candidates)                                                                     \
    SM_SHARED(unsigned, candidate_count, 1);                                                          \
    SM_SHARED(unsigned, candidate_groups_count, 1);                                                   \
    SM_SHARED(int, candidate_groups, kMaxCandidates);                                                 \
    SM_SHARED(uint64_t, candidates_found, kMaxCandidates);                                            \
    SM_SHARED(uint64_t, candidate_units, kMaxCandidates);                                             \
    SM_SHARED(uint64_t, candidates_sorted, kMaxCandidates);                                           \
    SM_SHARED(uint64_t, candidates_before, kMaxCandidates + 1);                                       \
    const Candidates candidates {                                                                     \
        candidate_count, candidate_groups_count, candidate_groups, candidates_found, candidate_units, \
            candidates_sorted, candidates_before                                                      \
    }

}  // namespace
}  // namespace speculative_mamba::cuda
