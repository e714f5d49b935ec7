// The law of a position of which few tokens can matter: top-k, or a small vocabulary. A block gathers them from the
// groups of a survey, and the filters need no more than each one's rank and the sum of those before it.
#pragma once

#include "block.cuh"
#include "survey.cuh"
#include "weights.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kListed = kMaxThreads;  // a thread takes an entry

struct ListMemory {
    uint64_t *leaders, *units;  // (kListed): of the tokens that may be kept, in any order
    unsigned* counts;           // (3): groups, tokens, tokens that are kept
    int *groups, *tokens;       // (kListed): from here on in order
    float* weights;             // (kListed)
    uint64_t* before;           // (kListed + 1): what the entries before this one count
};
#define SM_LIST_MEMORY(memory)                                                                     \
    SM_SHARED(uint64_t, list_leaders, kListed);                                                    \
    SM_SHARED(uint64_t, list_units, kListed);                                                      \
    SM_SHARED(unsigned, list_counts, 3);                                                           \
    SM_SHARED(int, list_groups, kListed);                                                          \
    SM_SHARED(int, list_tokens, kListed);                                                          \
    SM_SHARED(float, list_weights, kListed);                                                       \
    SM_SHARED(uint64_t, list_before, kListed + 1);                                                 \
    const ListMemory memory {                                                                      \
        list_leaders, list_units, list_counts, list_groups, list_tokens, list_weights, list_before \
    }

// How many tokens a law may have, where that is few; 0 where it is not.
inline int shortlist_for(int64_t vocabulary, const Filters& f) {
    const int64_t most = 0 < f.top_k && f.top_k < vocabulary ? f.top_k : vocabulary;
    return most <= kListed ? static_cast<int>(most) : 0;
}

struct Shortlist {
    ListMemory list;
    int kept = 0;

    // The tokens of the law, of which each thread knows one at most: act(token, weight).
    template <typename Act>
    __device__ void for_mine(Act act) const {
        const int i = static_cast<int>(threadIdx.x);
        if (i < kept) act(load_raw(list.tokens + i), load_raw(list.weights + i));
    }
    __device__ float scale(const Memory&) const { return scale_of(load_raw(list.before + kept)); }
    __device__ float weight_of(const Memory& m, int token) const {
        uint64_t mine = 0;
        for_mine([&](int other, float weight) {
            uint32_t bits;
            memcpy(&bits, &weight, sizeof bits);
            if (other == token) mine = bits;
        });
        const auto bits = static_cast<uint32_t>(of_block(m, mine, either));
        float weight;
        memcpy(&weight, &bits, sizeof weight);
        return weight;
    }

    // Makes the law of at most `most` tokens, unless there is none or too many tokens are almost equal.
    __device__ bool make(const Memory& m, const Position& position, const Filters& f, int most, Verdict& verdict) {
        const int thread = static_cast<int>(threadIdx.x);
        const auto* places = reinterpret_cast<const uint32_t*>(position.scratch);
        const int groups = groups_of(position.logits.vocabulary);
        auto for_each_group = [&](auto act) { for_each(groups, [&](int i) { return load_raw(places + i); }, act); };
        uint64_t first = ~uint64_t{0};
        for_each_group([&](int, uint32_t place) { first = smaller(first, place); });
        if (thread < 3) store_raw(list.counts + thread, 0u);
        const Weigh weigh{logit_at(static_cast<uint32_t>(of_block(m, first, smaller))), f.temperature};
        verdict = verdict_on(weigh.peak, false);
        if (verdict != Verdict::ok) return true;

        // As many groups have a token up to this bin as the law may have tokens.
        const Histogram histogram{m};
        histogram.clear();
        for_each_group([&](int, uint32_t place) {
            const int bin = weigh.bin(logit_at(place));
            if (bin < kBins) histogram.add(bin, 1);
        });
        const int found = histogram.find(static_cast<uint64_t>(most)).bin, last = found < kBins ? found : kBins - 1;
        for_each_group([&](int group, uint32_t place) {
            if (weigh.bin(logit_at(place)) <= last)
                append(list.counts, [&](int at) { store_raw(list.groups + at, group); });
        });
        __syncthreads();
        const int near = static_cast<int>(load_raw(list.counts));
        if (near > kListed) return false;
        for_each(
            near * kGroup,
            [&](int i) {
                const int token = load_raw(list.groups + i / kGroup) * kGroup + i % kGroup;
                return token < position.logits.vocabulary ? position.logits[token] : -HUGE_VALF;
            },
            [&](int i, float logit) {
                if (weigh.bin(logit) > last) return;
                const int token = load_raw(list.groups + i / kGroup) * kGroup + i % kGroup;
                append(list.counts + 1, [&](int at) {
                    store_raw(list.leaders + at, leader_of(place_of(logit), token));
                    store_raw(list.units + at, to_units(weigh(logit)));
                });
            });
        __syncthreads();
        const int count = static_cast<int>(load_raw(list.counts + 1));
        if (count > kListed) return false;
        rank(weigh, count);
        cut(f, count < most ? count : most);
        return true;
    }

 private:
    template <typename Store>
    __device__ void append(unsigned* count, Store store_at) const {
        const auto at = static_cast<int>(add_atomically(count, 1));
        if (at < kListed) store_at(at);
    }

    __device__ void rank(const Weigh& weigh, int count) const {
        if (static_cast<int>(threadIdx.x) < count) {
            const uint64_t mine = load_raw(list.leaders + threadIdx.x), units = load_raw(list.units + threadIdx.x);
            int rank = 0;
            uint64_t before = 0;
            for (int i = 0; i < count; i++) {
                const uint64_t other = load_raw(list.leaders + i), counts = load_raw(list.units + i);
                if (other < mine) rank++, before += counts;
            }
            store_raw(list.tokens + rank, static_cast<int>(mine & 0xffffffffu));
            store_raw(list.weights + rank, weigh(logit_at(static_cast<uint32_t>(mine >> 32))));
            store_raw(list.before + rank, before);
            if (rank + 1 == count) store_raw(list.before + count, before + units);
        }
        __syncthreads();
    }

    // Of the first `count` those that top-p and min-p keep.
    __device__ void cut(const Filters& f, int count) {
        const int i = static_cast<int>(threadIdx.x);
        const uint64_t enough = f.top_p < 1.f ? nucleus_of(f, load_raw(list.before + count)) : ~uint64_t{0};
        const float lightest = lightest_of(f);
        auto keeps = [&](int at) {
            return at < count && load_raw(list.before + at) < enough && load_raw(list.weights + at) >= lightest;
        };
        if (keeps(i) && !keeps(i + 1)) store_raw(list.counts + 2, static_cast<unsigned>(i + 1));
        __syncthreads();
        kept = static_cast<int>(load_raw(list.counts + 2));
    }
};

}  // namespace
}  // namespace speculative_mamba::cuda
