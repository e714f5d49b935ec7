// A first launch over all logits, which leaves little to read for the next: a warp takes a span of a position's tokens.
#pragma once

#include "list.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kSurveyors = 128, kSpan = 512, kQuads = kSpan / kWarp / 4;
constexpr int kGroup = 32;  // tokens of which the least place is kept

__host__ __device__ inline int64_t spans_of(int64_t vocabulary) { return (vocabulary + kSpan - 1) / kSpan; }

// What a survey leaves of a position.
struct Groups {
    const uint32_t* places;  // (⌈V / 32⌉): the least of each
    int count;

    // Calls act(group, place), each by one thread of the block.
    template <typename Act>
    __device__ void for_each(Act act) const {
        cuda::for_each(count, [&](int i) { return load_raw(places + i); }, act);
    }
};
__device__ __forceinline__ Groups groups_of(const Position& position) {
    return {position.scratch.places(), (position.logits.vocabulary + kGroup - 1) / kGroup};
}

template <int Lanes, typename T>
__device__ __forceinline__ T least_of_lanes(T value) {
#pragma unroll
    for (int mask = Lanes / 2; mask > 0; mask /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, value, mask);
        value = other < value ? other : value;
    }
    return value;
}

// Keeps of every span its leader, or of every group its least place. A law is filled with zeros, which most of it is.
template <bool Greedy, typename Params>
__global__ void __launch_bounds__(kSurveyors, 4) survey(Params p) {
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, vocabulary = static_cast<int>(p.vocabulary);
    const int span = static_cast<int>(blockIdx.x * (kSurveyors / kWarp) + threadIdx.x / kWarp);
    if (span >= spans_of(vocabulary)) return;
    const int64_t row = blockIdx.y;
    const Position position = position_of(p, row, blockIdx.z);
    const bool active = is_active(p, row);
    if (!Greedy && tallies(p.filters, vocabulary)) {
        for (int i = span * kWarp + lane; i < 2 * kBins; i += static_cast<int>(spans_of(vocabulary)) * kWarp)
            store_raw(position.scratch.tally() + i, 0u);
    }
    uint64_t leader = ~uint64_t{0};
    auto first_of = [&](int quad) { return span * kSpan + (quad * kWarp + lane) * 4; };
    auto count_of = [&](int quad) { return vocabulary - first_of(quad) < 4 ? vocabulary - first_of(quad) : 4; };
    auto look_at = [&](int quad, const Float4& logits) {
        const int first = first_of(quad), count = count_of(quad);
        uint32_t least = ~0u;
        int token = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= count) continue;
            const uint32_t place = place_of(position.logits.adjusted(first + i, logits.v[i]));
            if (place < least) least = place, token = first + i;
        }
        if (position.law) store4(position.law + first, Float4{}, count);
        if constexpr (Greedy) {
            const uint64_t mine = leader_of(least, token);
            leader = mine < leader ? mine : leader;
        } else {
            least = least_of_lanes<kGroup / 4>(least);
            if (lane % (kGroup / 4) == 0 && count > 0) store_raw(position.scratch.places() + first / kGroup, least);
        }
    };
    Float4 quads[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; q++) quads[q] = load4(position.logits.values + first_of(q), count_of(q));
    if (!active) return;
#pragma unroll
    for (int q = 0; q < kQuads; q++) look_at(q, quads[q]);
    if constexpr (Greedy) {
        leader = least_of_lanes<kWarp>(leader);
        if (lane == 0) store_raw(position.scratch.leaders() + span, leader);
    }
}

template <bool Greedy, typename Params>
inline void launch_survey(const Params& p, int64_t tokens, cudaStream_t stream) {
    const dim3 blocks(blocks_for(spans_of(p.vocabulary), kSurveyors / kWarp), static_cast<unsigned>(p.batch),
                      static_cast<unsigned>(tokens));
    launch(survey<Greedy, Params>, blocks, dim3(kSurveyors), stream, p);
}

struct Leader {
    Verdict verdict;
    int token;
};

// By a warp, after a greedy survey.
__device__ __forceinline__ Leader leader_of(const Position& position) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int spans = static_cast<int>(spans_of(position.logits.vocabulary));
    uint64_t leader = ~uint64_t{0};
#pragma unroll 4
    for (int span = lane; span < spans; span += kWarp) {
        const uint64_t other = load_raw(position.scratch.leaders() + span);
        leader = other < leader ? other : leader;
    }
    leader = least_of_lanes<kWarp>(leader);
    return {verdict_on(logit_of(leader), true), token_of(leader)};
}

}  // namespace
}  // namespace speculative_mamba::cuda
