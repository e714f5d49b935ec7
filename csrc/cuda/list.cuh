// A few tokens of a position in the order of their places, of equal ones by id. A thread of the block takes one.
#pragma once

#include "block.cuh"
#include "logits.cuh"
#include "weights.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kListed = kMaxThreads;

// A token with its place, as a number that is the less the likelier.
__device__ __forceinline__ uint64_t leader_of(uint32_t place, int token) {
    return static_cast<uint64_t>(place) << 32 | static_cast<unsigned>(token);
}
__device__ __forceinline__ int token_of(uint64_t leader) { return static_cast<int>(leader & 0xffffffffu); }
__device__ __forceinline__ float logit_of(uint64_t leader) { return logit_at(static_cast<uint32_t>(leader >> 32)); }

struct List {
    unsigned* count;
    uint64_t *met, *units;       // (kListed): tokens as they come, and what they count
    uint64_t *leaders, *before;  // (kListed), (kListed + 1): in order, and what those before each count

    __device__ void clear() const {
        if (threadIdx.x == 0) store_raw(count, 0u);
        __syncthreads();
    }
    // By any thread; tokens beyond kListed are counted only.
    __device__ void add(int token, float logit, uint64_t counts) const {
        const unsigned at = add_atomically(count, 1);
        if (at >= kListed) return;
        store_raw(met + at, leader_of(place_of(logit), token));
        store_raw(units + at, counts);
    }
    __device__ int size() const {
        __syncthreads();
        return static_cast<int>(load_raw(count));
    }
    // Puts the tokens in order.
    __device__ void rank(int size) const {
        if (static_cast<int>(threadIdx.x) < size) {
            const uint64_t mine = load_raw(met + threadIdx.x), counts = load_raw(units + threadIdx.x);
            int rank = 0;
            uint64_t sum = 0;
#pragma unroll 8
            for (int i = 0; i < size; i++) {
                const uint64_t other = load_raw(met + i), its = load_raw(units + i);
                if (other < mine) rank++, sum += its;
            }
            store_raw(leaders + rank, mine);
            store_raw(before + rank, sum);
            if (rank + 1 == size) store_raw(before + size, sum + counts);
        }
        __syncthreads();
    }
};
#define SM_LIST(list)                              \
    SM_SHARED(unsigned, list_count, 1);            \
    SM_SHARED(uint64_t, list_met, kListed);        \
    SM_SHARED(uint64_t, list_units, kListed);      \
    SM_SHARED(uint64_t, list_leaders, kListed);    \
    SM_SHARED(uint64_t, list_before, kListed + 1); \
    const List list { list_count, list_met, list_units, list_leaders, list_before }

}  // namespace
}  // namespace speculative_mamba::cuda
