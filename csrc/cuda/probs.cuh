// What is sampled at a position, by a block: weights, of which the likeliest token's is 1, and the tokens that top-k,
// top-p and min-p keep. Few tokens are listed in shared memory; of many only a threshold is known, and their logits are
// read again. Weights are summed in fixed point.
#pragma once

#include "candidates.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kMaxVocabulary = kBins * kBins;

inline dim3 threads_for(int64_t vocabulary) {
    if (vocabulary > kMaxVocabulary) throw std::invalid_argument("the CUDA kernel takes up to 4194304 tokens");
    unsigned threads = kWarp;
    while (threads < kMaxThreads && threads < vocabulary) threads *= 2;
    return {threads};
}

struct TargetProbs {
    const BlockMemory m;
    const Candidates candidates;
    const Position position;
    const Weights weights;
    const float min_weight;
    // Tokens up to this sort key are kept, of those at it the ids up to last_id.
    uint32_t last_key = ~0u;
    int last_id = kMaxVocabulary;
    int listed = -1;  // how many candidates are kept, in order; -1: the threshold says which
    float scale = 0.f;

    __device__ TargetProbs(const BlockMemory& m, const Candidates& candidates, const Position& position, float peak,
                           const RowSampling& row)
        : m(m),
          candidates(candidates),
          position(position),
          weights{peak, row.temperature},
          min_weight(static_cast<float>(row.min_p * (1 - kRounding))) {
        const int vocabulary = position.vocabulary;
        const bool ranks = 0 < row.top_k && row.top_k < vocabulary;
        const int limit = ranks ? row.top_k : vocabulary;
        if (limit <= kMaxCandidates) {
            list_top(limit, row.top_p);
        } else if (ranks) {
            keep(static_cast<uint64_t>(limit), By::rank);
            if (row.top_p < 1.f) keep(nucleus(row.top_p, total()), By::weight);
        } else if (row.top_p < 1.f) {
            list_nucleus(row.top_p);
        }
        scale = scale_of(listed < 0 ? total() : load_raw(candidates.before + listed));
    }

    // 1 for the likeliest token; 0 where filtered.
    __device__ float weight(int token, float logit) const {
        const uint32_t key = sort_key(logit);
        const float weight = key < last_key || (key == last_key && token <= last_id) ? weights(logit) : 0.f;
        return weight >= min_weight ? weight : 0.f;
    }
    __device__ float operator[](int token) const { return weight(token, load(position.logits + token)) * scale; }

    // Calls act(token, weight) for the kept tokens at least, each by one thread.
    template <typename Act>
    __device__ __forceinline__ void for_each(Act act) const {
        if (listed < 0) return for_each_logit([&](int token, float logit) { act(token, weight(token, logit)); });
        if (static_cast<int>(threadIdx.x) >= listed) return;
        const uint64_t mine = load_raw(candidates.sorted + threadIdx.x);
        act(token_of(mine), weights(logit_of(key_of(mine))));
    }

 private:
    template <typename Act>
    __device__ __forceinline__ void for_each_logit(Act act) const {
        cuda::for_each(position.vocabulary, [&](int token) { return load(position.logits + token); }, act);
    }
    // Calls act(group, running_max logit of it).
    template <typename Act>
    __device__ __forceinline__ void for_each_group(Act act) const {
        cuda::for_each(
            position.groups(), [&](int i) { return load_raw(position.keys + i); },
            [&](int group, uint32_t key) { act(group, logit_of(key)); });
    }
    __device__ uint64_t total() const {
        uint64_t sum = 0;
        for_each_logit([&](int token, float logit) { sum += to_units(weight(token, logit)); });
        return block_reduce(m, sum, Sum{});
    }
    // A nucleus is reached by the first tokens that count this, of all that count `total`.
    __device__ static uint64_t nucleus(float top_p, uint64_t total) {
        const double enough = (static_cast<double>(top_p) - kRounding) * static_cast<double>(total);
        return enough > 1 ? static_cast<uint64_t>(ceil(enough)) : 1;
    }

    // Lists the top `limit` tokens, and of them those that top-p and min-p keep.
    __device__ void list_top(int limit, float top_p) {
        candidates.clear();
        const int last = list_groups(limit);
        const int groups = static_cast<int>(load_raw(candidates.num_groups));
        if (groups <= kMaxCandidates) list_tokens_of_groups(groups, last);
        int size = groups <= kMaxCandidates ? candidates.size() : groups;
        if (size > kMaxCandidates) {  // too many tokens are almost equal
            keep(static_cast<uint64_t>(limit), By::rank);
            candidates.clear();
            for_each_logit([&](int token, float logit) {
                const uint32_t key = sort_key(logit);
                if (weights(logit) > 0.f && (key < last_key || (key == last_key && token <= last_id)))
                    candidates.add(token, logit, to_units(weights(logit)));
            });
            size = candidates.size();
        }
        candidates.sort(size);
        size = Min{}(size, limit);
        cut(size, top_p < 1.f ? nucleus(top_p, load_raw(candidates.before + size)) : ~uint64_t{0}, min_weight);
    }

    // As many groups as tokens are wanted have one up to the bin that this returns; those groups are listed.
    __device__ int list_groups(int limit) const {
        const Histogram histogram{m};
        histogram.clear();
        for_each_group([&](int, float logit) {
            const int bin = weights.bin(logit);
            if (bin < kBins) histogram.add(bin, 1);
        });
        const int last = Min{}(histogram.find(static_cast<uint64_t>(limit)).bin, kBins - 1);
        for_each_group([&](int group, float logit) {
            if (weights.bin(logit) <= last) candidates.add_group(group);
        });
        __syncthreads();
        return last;
    }
    __device__ void list_tokens_of_groups(int groups, int last) const {
        const int vocabulary = position.vocabulary;
        auto token_at = [&](int i) { return load_raw(candidates.groups + i / kGroup) * kGroup + i % kGroup; };
        cuda::for_each(
            groups * kGroup,
            [&](int i) { return token_at(i) < vocabulary ? load(position.logits + token_at(i)) : -HUGE_VALF; },
            [&](int i, float logit) {
                if (weights.bin(logit) <= last) candidates.add(token_at(i), logit, to_units(weights(logit)));
            });
    }

    // Top-p of the whole vocabulary: lists the nucleus, or where that is too large finds the threshold.
    __device__ void list_nucleus(float top_p) {
        const Histogram histogram{m};
        histogram.clear();
        uint64_t sum = 0;
        for_each_logit([&](int, float logit) {
            const int bin = weights.bin(logit);
            const uint64_t units = to_units(weights(logit));
            if (bin < kBins && units > 0) histogram.add(bin, units);
            sum += bin < kBins ? units : 0;
        });
        const uint64_t enough = nucleus(top_p, block_reduce(m, sum, Sum{}));
        const Histogram::Found last = histogram.find(enough);
        auto list_bins = [&](int first) {
            candidates.clear();
            for_each_logit([&](int token, float logit) {
                const int bin = weights.bin(logit);
                if (first <= bin && bin <= last.bin) candidates.add(token, logit, to_units(weights(logit)));
            });
            return candidates.size();
        };
        if (const int size = list_bins(0); size <= kMaxCandidates) {
            candidates.sort(size);
            return cut(size, enough, min_weight);
        }
        if (const int size = list_bins(last.bin); size <= kMaxCandidates) {
            candidates.sort(size);
            cut(size, enough - last.before, 0.f);
            listed = -1;  // it is the threshold that counts
            return;
        }
        keep(enough, By::weight);
    }

    // Of the first `size` candidates those that have less than `enough` before them and weigh at least `lightest`; the
    // first does.
    __device__ void cut(int size, uint64_t enough, float lightest) {
        const int i = static_cast<int>(threadIdx.x);
        auto keeps = [&](int at) {
            return at < size && load_raw(candidates.before + at) < enough &&
                   weights(logit_of(key_of(load_raw(candidates.sorted + at)))) >= lightest;
        };
        if (keeps(i) && !keeps(i + 1)) store_raw(candidates.num_groups, static_cast<unsigned>(i + 1));
        __syncthreads();
        listed = static_cast<int>(load_raw(candidates.num_groups));
        const uint64_t last = load_raw(candidates.sorted + listed - 1);
        last_key = key_of(last), last_id = token_of(last);
    }

    // Keeps the tokens that have less than `target` before them, in order of sort key, of equal ones by id. A token
    // counts 1, or its weight. Those that an earlier threshold dropped are counted too, after all that can matter:
    // `target` is at most what the others count. A radix search: logits are read again for every eleven bits.
    enum class By { rank, weight };
    __device__ void keep(uint64_t target, By by) {
        auto measure = [&](float weight) { return by == By::rank ? uint64_t{1} : to_units(weight); };
        const Histogram histogram{m};
        uint64_t found = 0, inside = 0;  // the first bits of the last key, and what its tokens count
        for (int left = 32; left > 0;) {
            const int known = left;
            left = left > kDigit ? left - kDigit : 0;
            histogram.clear();
            for_each_logit([&](int, float logit) {
                const uint64_t key = sort_key(logit);
                if (key >> known != found) return;
                const float weight = weights(logit);
                const auto bin = static_cast<int>(key >> left & ((1u << (known - left)) - 1));
                if (weight > 0.f) histogram.add(bin, measure(weight));
            });
            const Histogram::Found digit = histogram.find(target);
            if (digit.bin == kBins) return;
            found = found << (known - left) | digit.bin, target -= digit.before, inside = digit.inside;
        }
        const auto key = static_cast<uint32_t>(found);
        const uint64_t each = measure(weights(logit_of(key)));
        last_key = key;
        last_id = target + each <= inside ? id_of(key, (target + each - 1) / each) : kMaxVocabulary;
    }
    // The id of the n-th token with a sort key.
    __device__ int id_of(uint32_t key, uint64_t n) const {
        const Histogram histogram{m};
        int first = 0, end = position.vocabulary;
        while (end - first > 1) {
            const int width = (end - first + kBins - 1) / kBins;
            histogram.clear();
            for_each_logit([&](int token, float logit) {
                if (first <= token && token < end && sort_key(logit) == key) histogram.add((token - first) / width, 1);
            });
            const Histogram::Found part = histogram.find(n);
            first += part.bin * width, n -= part.before;
            end = Min{}(first + width, end);
        }
        return first;
    }
};

}  // namespace
}  // namespace speculative_mamba::cuda
