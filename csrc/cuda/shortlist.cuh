// The law of a position of which few tokens can matter: top-k, or a small vocabulary. A block lists them, and the
// filters need no more than the sum of those before each.
#pragma once

#include "law.cuh"
#include "list.cuh"

namespace speculative_mamba::cuda {
namespace {

// How many tokens a law may have, where that is few; 0 where it is not.
inline int shortlist_for(int64_t vocabulary, const Filters& f) {
    const int64_t most = ranks(f, vocabulary) ? f.top_k : vocabulary;
    return most <= kListed ? static_cast<int>(most) : 0;
}

struct Shortlist {
    List list;
    unsigned* near_count;
    int* near;  // (kListed): groups that may have a token of the list
    Weigh weigh;
    int kept;

    // The token that this thread has, if any: act(token, weight).
    template <typename Act>
    __device__ void for_mine(Act act) const {
        if (static_cast<int>(threadIdx.x) >= kept) return;
        const uint64_t leader = load_raw(list.leaders + threadIdx.x);
        act(token_of(leader), weigh(logit_of(leader)));
    }
    __device__ float scale() const { return scale_of(load_raw(list.before + kept)); }
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

    // Makes the law of at most `most` tokens.
    __device__ void make(const Memory& m, Law& law, const Groups& groups, const Filters& f, int most) {
        weigh = law.weigh;
        if (threadIdx.x == 0) store_raw(near_count, 0u);
        list.clear();
        const int last = gather_groups(m, groups, most);
        const auto count = static_cast<int>(load_raw(near_count));
        if (count <= kListed) gather_tokens(law.logits, count, last);
        int size = count <= kListed ? list.size() : count;
        if (size > kListed) {  // too many tokens are almost equal
            law.keep(m, static_cast<uint64_t>(most), Law::By::rank);
            list.clear();
            for_each_logit(law.logits, law.logits.vocabulary, [&](int token, float logit) {
                const float weight = law.weight(token, logit);
                if (weight > 0.f) list.add(token, logit, to_units(weight));
            });
            size = list.size();
        }
        list.rank(size);
        cut(f, size < most ? size : most);
    }

 private:
    // As many groups as the law may have tokens have one up to the bin that this returns.
    __device__ int gather_groups(const Memory& m, const Groups& groups, int most) const {
        const Histogram histogram{m};
        histogram.clear();
        groups.for_each([&](int, uint32_t place) {
            const int bin = weigh.bin(logit_at(place));
            if (bin < kBins) histogram.add(bin, 1);
        });
        const int found = histogram.find(static_cast<uint64_t>(most)).bin, last = found < kBins ? found : kBins - 1;
        groups.for_each([&](int group, uint32_t place) {
            if (weigh.bin(logit_at(place)) > last) return;
            const unsigned at = add_atomically(near_count, 1);
            if (at < kListed) store_raw(near + at, group);
        });
        __syncthreads();
        return last;
    }
    __device__ void gather_tokens(const Logits& logits, int count, int last) const {
        auto token_at = [&](int i) { return load_raw(near + i / kGroup) * kGroup + i % kGroup; };
        for_each(
            count * kGroup, [&](int i) { return token_at(i) < logits.vocabulary ? logits[token_at(i)] : -HUGE_VALF; },
            [&](int i, float logit) {
                if (weigh.bin(logit) <= last) list.add(token_at(i), logit, to_units(weigh(logit)));
            });
    }

    // Of the first `count` those that top-p and min-p keep.
    __device__ void cut(const Filters& f, int count) {
        const int i = static_cast<int>(threadIdx.x);
        const uint64_t enough = f.top_p < 1.f ? nucleus_of(f, load_raw(list.before + count)) : ~uint64_t{0};
        const float lightest = lightest_of(f);
        auto keeps = [&](int at) {
            return at < count && load_raw(list.before + at) < enough &&
                   weigh(logit_of(load_raw(list.leaders + at))) >= lightest;
        };
        if (keeps(i) && !keeps(i + 1)) store_raw(near_count, static_cast<unsigned>(i + 1));
        __syncthreads();
        kept = static_cast<int>(load_raw(near_count));
    }
};
#define SM_SHORTLIST(shortlist)         \
    SM_LIST(list);                      \
    SM_SHARED(unsigned, near_count, 1); \
    SM_SHARED(int, near, kListed);      \
    Shortlist shortlist{list, near_count, near, {}, 0}

}  // namespace
}  // namespace speculative_mamba::cuda
