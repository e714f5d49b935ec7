// A warp has a token. Which lane adds what depends on the number of experts alone.
#include "logits.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr uint32_t kTaken = ~0u;  // the sort key of nothing that may still be chosen

// Of the best key that is not taken yet, its place; it is taken then. The same in each lane.
__device__ __forceinline__ int take_best(uint32_t* keys, int count) {
    const int lane = static_cast<int>(threadIdx.x);
    uint64_t best = ~uint64_t{0};
    for (int i = lane; i < count; i += kWarp) best = Min{}(best, packed(load_raw(keys + i), i));
    const int place = token_of(warp_reduce<kWarp>(best, Min{}));
    if (place % kWarp == lane) store_raw(keys + place, kTaken);
    return place;
}

__global__ void __launch_bounds__(kWarp) select(SelectExpertsParams p) {
    SM_SHARED(float, scores, kMaxExperts);
    SM_SHARED(uint32_t, keys, kMaxExperts);
    SM_SHARED(uint32_t, group_keys, kMaxExperts);
    SM_SHARED(int, chosen, kMaxExperts);
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x), count = static_cast<int>(p.num_experts);
    const int groups = static_cast<int>(p.groups), size = count / groups, top_k = static_cast<int>(p.top_k);
    const int64_t row = blockIdx.x;
    const float* logits = p.logits + row * p.logits_row_stride;
    float max = -INFINITY, total = 0.f;
    for (int e = lane; e < count; e += kWarp) max = fmaxf(max, load(logits + e));
    max = warp_reduce_max<kWarp>(max);
    for (int e = lane; e < count; e += kWarp) {
        const float logit = load(logits + e);
        const float score = p.score == kSigmoid ? 1.f / (1.f + expf(-logit)) : expf(logit - max);
        store(scores + e, score);
        total += score;
    }
    total = warp_reduce_sum<kWarp>(total);
    for (int e = lane; e < count; e += kWarp) {
        const float score = p.score == kSigmoid ? load(scores + e) : load(scores + e) / total;
        store(scores + e, score);
        store_raw(keys + e, sort_key(p.bias ? score + load(p.bias + e) : score));
    }
    __syncwarp();
    if (groups > 1) {
        for (int g = lane; g < groups; g += kWarp) {
            uint32_t first = kTaken, second = kTaken;
            for (int e = g * size; e < (g + 1) * size; e++) {
                const uint32_t key = load_raw(keys + e);
                second = Min{}(second, first < key ? key : first);
                first = Min{}(first, key);
            }
            store_raw(group_keys + g, sort_key(logit_of(first) + logit_of(second)));
        }
        __syncwarp();
        for (int i = 0; i < static_cast<int>(p.top_k_groups); i++) {
            take_best(group_keys, groups);
            __syncwarp();
        }
        for (int e = lane; e < count; e += kWarp)
            if (load_raw(group_keys + e / size) != kTaken) store_raw(keys + e, kTaken);
        __syncwarp();
    }
    float sum = 0.f;
    for (int i = 0; i < top_k; i++) {
        const int expert = take_best(keys, count);
        if (lane == 0) store_raw(chosen + i, expert);
        sum += load(scores + expert);
        __syncwarp();
    }
    for (int i = lane; i < top_k; i += kWarp) {
        const int expert = load_raw(chosen + i);
        float weight = load(scores + expert);
        if (p.normalize) weight /= sum + p.epsilon;
        store(p.weights + row * top_k + i, weight * p.scale);
        store_raw(p.experts + row * top_k + i, static_cast<int32_t>(expert));
    }
}

}  // namespace

void select_experts(const SelectExpertsParams& p, cudaStream_t stream) {
    launch(select, dim3(static_cast<unsigned>(p.rows)), dim3(kWarp), stream, p);
}

}  // namespace speculative_mamba::cuda
