// Which tokens of a position a law holds, and their weights.
#pragma once

#include "survey.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kMaxVocabulary = kBins * kBins;

inline dim3 threads_for(int64_t vocabulary) {
    if (vocabulary > kMaxVocabulary) throw std::invalid_argument("the CUDA kernel takes up to 4194304 tokens");
    unsigned threads = kWarp;
    while (threads < kMaxThreads && threads < vocabulary) threads *= 2;
    return {threads};
}

// Calls act(token, logit) for tokens 0 … end-1, each by one thread of the block.
template <typename Act>
__device__ __forceinline__ void for_each_logit(const Logits& logits, int end, Act act) {
    for_each(end, [&](int token) { return logits[token]; }, act);
}

struct Law {
    Logits logits;
    Weigh weigh;
    float lightest;
    uint32_t last_place;  // tokens up to this place belong to the law, of those at it the ids up to last_id
    int last_id;

    __device__ bool holds(uint32_t place, int token) const {
        return place < last_place || (place == last_place && token <= last_id);
    }
    // 1 for the likeliest token; 0 where filtered.
    __device__ float weight(int token, float logit) const {
        const float result = holds(place_of(logit), token) ? weigh(logit) : 0.f;
        return result >= lightest ? result : 0.f;
    }

    // The law of all tokens, by a block. Verdict::ok, or why there is none.
    __device__ Verdict begin(const Memory& m, const Position& position, const Filters& f) {
        uint64_t first = ~uint64_t{0};
        groups_of(position).for_each([&](int, uint32_t place) { first = smaller(first, place); });
        logits = position.logits;
        weigh = Weigh(logit_at(static_cast<uint32_t>(of_block(m, first, smaller))), f.temperature);
        lightest = 0.f, last_place = ~0u, last_id = logits.vocabulary;
        return verdict_on(weigh.peak, false);
    }

    // The sum of all weights.
    __device__ uint64_t total(const Memory& m) const {
        uint64_t sum = 0;
        for_each_logit(logits, logits.vocabulary,
                       [&](int token, float logit) { sum += to_units(weight(token, logit)); });
        return of_block(m, sum, plus);
    }

    // Keeps the tokens that have less than `target` before them, in order of place, of equal ones by id. A token counts
    // 1, or its weight. Those that an earlier cut dropped are counted too, after all that can matter: `target` is at
    // most what the others count. Nothing is kept of the row: its logits are read again for every eleven bits.
    enum class By { rank, weight };
    __device__ void keep(const Memory& m, uint64_t target, By by) {
        auto measure = [&](float weight) { return by == By::rank ? uint64_t{1} : to_units(weight); };
        const Histogram histogram{m};
        uint64_t found = 0, inside = 0;  // the first bits of the last place, and what its tokens count
        for (int left = 32; left > 0;) {
            const int known = left;
            left = left > kDigit ? left - kDigit : 0;
            histogram.clear();
            for_each_logit(logits, logits.vocabulary, [&](int, float logit) {
                const uint64_t place = place_of(logit);
                if (place >> known != found) return;
                const float weight = weigh(logit);
                const auto bin = static_cast<int>(place >> left & ((1u << (known - left)) - 1));
                if (weight > 0.f) histogram.add(bin, measure(weight));
            });
            const Histogram::Found digit = histogram.find(target);
            if (digit.bin == kBins) return;
            found = found << (known - left) | digit.bin, target -= digit.before, inside = digit.inside;
        }
        const auto place = static_cast<uint32_t>(found);
        const uint64_t each = measure(weigh(logit_at(place)));
        last_place = place;
        last_id = target + each <= inside ? id_of(m, place, (target + each - 1) / each) : logits.vocabulary;
    }

    // The same with the tokens of the last bin ranked; `target` counts from the bin's first on.
    __device__ void cut(const List& bin, int size, uint64_t target) {
        // Each thread knows one token at most, and the last that is needed says so to all.
        const int i = static_cast<int>(threadIdx.x);
        auto needed = [&](int at) { return at < size && load_raw(bin.before + at) < target; };
        if (needed(i) && !needed(i + 1)) store_raw(bin.met, load_raw(bin.leaders + i));
        __syncthreads();
        const uint64_t last = load_raw(bin.met);
        last_place = static_cast<uint32_t>(last >> 32), last_id = token_of(last);
    }

 private:
    // The id of the n-th token at a place.
    __device__ int id_of(const Memory& m, uint32_t place, uint64_t n) const {
        const Histogram histogram{m};
        int first = 0, end = logits.vocabulary;
        while (end - first > 1) {
            const int width = (end - first + kBins - 1) / kBins;
            histogram.clear();
            for_each_logit(logits, end, [&](int token, float logit) {
                if (token >= first && place_of(logit) == place) histogram.add((token - first) / width, 1);
            });
            const Histogram::Found part = histogram.find(n);
            first += part.bin * width, n -= part.before;
            end = first + width < end ? first + width : end;
        }
        return first;
    }
};

}  // namespace
}  // namespace speculative_mamba::cuda
