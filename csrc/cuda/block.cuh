// What the threads of a block find out together. What they sum are whole numbers, so their order does not matter.
#pragma once

#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / kWarp;
constexpr int kDigit = 11, kBins = 1 << kDigit;

// Shared memory of block_reduce and Histogram.
struct BlockMemory {
    unsigned *low, *high;  // (kBins): 64-bit sums in two halves, of which adding is fast
    uint64_t* warps;       // (kMaxWarps)
    uint64_t* found;       // (3)
};
#define SM_BLOCK_MEMORY(memory)            \
    SM_SHARED(unsigned, low, kBins);       \
    SM_SHARED(unsigned, high, kBins);      \
    SM_SHARED(uint64_t, warps, kMaxWarps); \
    SM_SHARED(uint64_t, found, 3);         \
    const BlockMemory memory { low, high, warps, found }

struct Min {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a < b ? a : b;
    }
};
struct Sum {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Or {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a | b; }
};

// Calls act(i, load_at(i)) for i = 0 … end-1, each by one thread.
template <typename Load, typename Act>
__device__ __forceinline__ void for_each(int end, Load load_at, Act act) {
    constexpr int kAhead = 4;  // loads that are under way at a time
    const int threads = static_cast<int>(blockDim.x);
    for (int first = static_cast<int>(threadIdx.x); first < end; first += kAhead * threads) {
        decltype(load_at(0)) values[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            if (first + i * threads < end) values[i] = load_at(first + i * threads);
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            if (first + i * threads < end) act(first + i * threads, values[i]);
    }
}

// Combines the values of neighbouring lanes; the same in each.
template <int Lanes, typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int mask = Lanes / 2; mask > 0; mask /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, mask));
    return value;
}

// Combines the values of all threads; the same in each.
template <typename Combine>
__device__ __forceinline__ uint64_t block_reduce(const BlockMemory& m, uint64_t value, Combine combine) {
    const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
    value = warp_reduce<kWarp>(value, combine);
    __syncthreads();
    if (thread % kWarp == 0) store_raw(m.warps + thread / kWarp, value);
    __syncthreads();
    value = load_raw(m.warps);
    for (int w = 1; w < warps; w++) value = combine(value, load_raw(m.warps + w));
    return value;
}

// Sums of what the threads add, by bins.
struct Histogram {
    BlockMemory m;

    __device__ void clear() const {
        for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
            store_raw(m.low + i, 0u);
            store_raw(m.high + i, 0u);
        }
        __syncthreads();
    }
    __device__ void add(int bin, uint64_t value) const {
        const auto low = static_cast<unsigned>(value);
        const unsigned carry = add_atomically(m.low + bin, low) + low < low;
        const unsigned high = static_cast<unsigned>(value >> 32) + carry;
        if (high) add_atomically(m.high + bin, high);
    }
    __device__ uint64_t at(int bin) const {
        return static_cast<uint64_t>(load_raw(m.high + bin)) << 32 | load_raw(m.low + bin);
    }

    // The bin in which the sum of all bins up to it reaches `target`, of at least 1.
    struct Found {
        int bin;  // kBins: none
        uint64_t before, inside;
    };
    __device__ Found find(uint64_t target) const {
        const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
        const int bins = kBins / static_cast<int>(blockDim.x), first = thread * bins;
        __syncthreads();
        uint64_t sum = 0;
        for (int i = first; i < first + bins; i++) sum += at(i);
        uint64_t before = 0, joined = sum;  // of lower lanes; of the lanes that have met
#pragma unroll
        for (int mask = 1; mask < kWarp; mask *= 2) {
            const uint64_t other = __shfl_xor_sync(kAllLanes, joined, mask);
            joined += other;
            if (lane & mask) before += other;
        }
        if (lane == 0) store_raw(m.warps + warp, joined);
        if (thread == 0) store_raw(m.found, static_cast<uint64_t>(kBins));
        __syncthreads();
        for (int w = 0; w < warp; w++) before += load_raw(m.warps + w);
        if (before < target && before + sum >= target) {
            int bin = first;
            for (; before + at(bin) < target; bin++) before += at(bin);
            store_raw(m.found, static_cast<uint64_t>(bin));
            store_raw(m.found + 1, before);
            store_raw(m.found + 2, at(bin));
        }
        __syncthreads();
        return {static_cast<int>(load_raw(m.found)), load_raw(m.found + 1), load_raw(m.found + 2)};
    }
};

}  // namespace
}  // namespace speculative_mamba::cuda
