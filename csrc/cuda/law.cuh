// From a row of logits to the law that is sampled, by one block: penalty, temperature, top-k, top-p, min-p. Nothing is
// kept of the row: its logits are read again for every question.
#pragma once

#include "logits.cuh"
#include "weights.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kMaxVocabulary = kBins * kBins;

inline dim3 threads_for(int64_t vocabulary) {
    if (vocabulary > kMaxVocabulary) throw std::invalid_argument("the CUDA kernel takes up to 4194304 tokens");
    unsigned threads = kWarp;
    while (threads < kMaxThreads && threads < vocabulary) threads *= 2;
    return {threads};
}

// Calls act(token, logit) for tokens 0 … end-1, each by one thread.
template <typename Act>
__device__ __forceinline__ void for_each_logit(const Logits& logits, int end, Act act) {
    for_each(end, [&](int token) { return logits[token]; }, act);
}

// Weights of all tokens, 1 for the likeliest; 0 where filtered.
struct Law {
    Logits logits;
    Weigh weigh;
    float lightest;
    uint32_t last_place;  // tokens up to this place belong to the law, of those at it the ids up to last_id
    int last_id;

    __device__ bool holds(uint32_t place, int token) const {
        return place < last_place || (place == last_place && token <= last_id);
    }
    __device__ float weight(int token) const { return weight(token, logits[token]); }
    __device__ float weight(int token, float logit) const {
        const float result = holds(place_of(logit), token) ? weigh(logit) : 0.f;
        return result >= lightest ? result : 0.f;
    }
    __device__ float weight_of(const Memory&, int token) const { return weight(token); }
    template <typename Act>
    __device__ void for_mine(Act act) const {
        for_each_logit(logits, logits.vocabulary, [&](int token, float logit) { act(token, weight(token, logit)); });
    }
    // The sum of all weights, in fixed point.
    __device__ uint64_t total(const Memory& m) const {
        uint64_t sum = 0;
        for_mine([&](int, float weight) { sum += to_units(weight); });
        return of_block(m, sum, plus);
    }
    __device__ float scale(const Memory& m) const { return scale_of(total(m)); }

    // Keeps the tokens that have less than `target` before them, in order of place, of equal ones by id. A token counts
    // measure(weight). Those that an earlier cut dropped are counted too, after all that can matter: `target` is at
    // most what the others count.
    template <typename Measure>
    __device__ void keep(const Memory& m, uint64_t target, Measure measure) {
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

    // Finds the law of the logits. Verdict::ok, or why there is none.
    __device__ Verdict make(const Memory& m, const Filters& f) {
        uint64_t first = ~uint64_t{0};
        for_each_logit(logits, logits.vocabulary, [&](int, float logit) { first = smaller(first, place_of(logit)); });
        weigh = {logit_at(static_cast<uint32_t>(of_block(m, first, smaller))), f.temperature};
        last_place = ~0u, last_id = logits.vocabulary, lightest = 0.f;
        const Verdict verdict = verdict_on(weigh.peak, false);
        if (verdict != Verdict::ok) return verdict;
        if (0 < f.top_k && f.top_k < logits.vocabulary)
            keep(m, static_cast<uint64_t>(f.top_k), [](float) { return uint64_t{1}; });
        if (f.top_p < 1.f) keep(m, nucleus_of(f, total(m)), [](float weight) { return to_units(weight); });
        lightest = lightest_of(f);
        return Verdict::ok;
    }
};

}  // namespace
}  // namespace speculative_mamba::cuda
