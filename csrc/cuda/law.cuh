// From a row of logits to the law that is sampled, by one block: penalty, temperature, top-k, top-p, min-p. Nothing is
// kept of the row: its logits are read again for every question.
#pragma once

#include "block.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr double kRounding = 1e-6;  // bounds are met up to the rounding of float32
constexpr float kSmallest = -87.f;  // weights of exp(-87) and below count as 0
constexpr int kMaxVocabulary = kBins * kBins;

inline dim3 threads_for(int64_t vocabulary) {
    if (vocabulary > kMaxVocabulary) throw std::invalid_argument("the CUDA kernel takes up to 4194304 tokens");
    unsigned threads = kWarp;
    while (threads < kMaxThreads && threads * 16 < vocabulary) threads *= 2;
    return {threads};
}

// A weight, of at most 1, in fixed point.
constexpr float kUnits = 0x1p42f;
__device__ __forceinline__ uint64_t to_units(float weight) { return static_cast<uint64_t>(weight * kUnits); }

// What makes a weight a probability.
__device__ __forceinline__ float scale_of(uint64_t total) {
    return static_cast<float>(static_cast<double>(kUnits) / static_cast<double>(total));
}

// Places order logits: the likelier, the smaller. Zeros of both signs share one, and NaN comes first.
__device__ __forceinline__ uint32_t place_of(float logit) {
    if (logit != logit) return 0;
    const float value = logit + 0.f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float logit_at(uint32_t place) {
    const uint32_t bits = place & 0x80000000u ? place : ~place & 0x7fffffffu;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

// Logits of tokens that the text holds lose: divided by the penalty if positive, else multiplied (Keskar et al. 2019,
// CTRL).
struct Logits {
    const float* values;  // (V)
    int vocabulary;
    float penalty;
    const bool* seen;       // (V): tokens of the text; read only with a penalty
    const int64_t* recent;  // further tokens of the text
    int64_t recent_tokens;

    __device__ float operator[](int token) const {
        const float value = load(values + token);
        if (penalty == 1.f) return value;
        bool in_text = load_raw(seen + token);
        for (int64_t i = 0; i < recent_tokens; i++) in_text |= load_raw(recent + i) == token;
        return !in_text ? value : value > 0 ? value / penalty : value * penalty;
    }
};

// Calls act(token, logit) for tokens 0 … end-1, each by one thread.
template <typename Act>
__device__ __forceinline__ void for_each_logit(const Logits& logits, int end, Act act) {
    constexpr int kAhead = 8;  // loads that are under way at a time
    const int threads = static_cast<int>(blockDim.x);
    for (int first = static_cast<int>(threadIdx.x); first < end; first += kAhead * threads) {
        float values[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) values[i] = first + i * threads < end ? logits[first + i * threads] : 0.f;
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            if (first + i * threads < end) act(first + i * threads, values[i]);
    }
}

// Weights of all tokens, 1 for the likeliest; 0 where filtered.
struct Law {
    Logits logits;
    float temperature, peak, lightest;
    int likeliest;
    uint32_t last_place;  // tokens up to this place belong to the law, of those at it the ids up to last_id
    int last_id;

    __device__ float weight_of(float logit) const {
        const float scaled = (logit - peak) / temperature;
        return scaled > kSmallest ? expf(scaled) : 0.f;
    }
    __device__ bool holds(uint32_t place, int token) const {
        return place < last_place || (place == last_place && token <= last_id);
    }
    __device__ float weight(int token) const { return weight(token, logits[token]); }
    __device__ float weight(int token, float logit) const {
        if (temperature == 0.f) return token == likeliest;
        const float result = holds(place_of(logit), token) ? weight_of(logit) : 0.f;
        return result >= lightest ? result : 0.f;
    }
    // The sum of all weights, in fixed point.
    __device__ uint64_t total(const Memory& m) const {
        uint64_t sum = 0;
        for_each_logit(logits, logits.vocabulary,
                       [&](int token, float logit) { sum += to_units(weight(token, logit)); });
        return of_block(m, sum, plus);
    }

    // Keeps the tokens that have less than `target` before them, in order of place, of equal ones by id. A token counts
    // measure(weight).
    template <typename Measure>
    __device__ void keep(const Memory& m, uint64_t target, Measure measure) {
        const Histogram histogram{m};
        uint64_t found = 0, inside = 0;  // the first bits of the last place, and what its tokens count
        for (int left = 32; left > 0;) {
            const int known = left;
            left = left > kDigit ? left - kDigit : 0;
            histogram.clear();
            for_each_logit(logits, logits.vocabulary, [&](int token, float logit) {
                const uint64_t place = place_of(logit);
                if (place >> known != found || !holds(static_cast<uint32_t>(place), token)) return;
                const float weight = weight_of(logit);
                const auto bin = static_cast<int>(place >> left & ((1u << (known - left)) - 1));
                if (weight > 0.f) histogram.add(bin, measure(weight));
            });
            const Histogram::Found digit = histogram.find(target);
            if (digit.bin == kBins) return;
            found = found << (known - left) | digit.bin, target -= digit.before, inside = digit.inside;
        }
        const auto place = static_cast<uint32_t>(found);
        const uint64_t each = measure(weight_of(logit_at(place)));
        if (place < last_place) last_id = logits.vocabulary;
        last_place = place;
        if (target + each <= inside) last_id = id_of(m, place, (target + each - 1) / each);
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
        for_each_logit(logits, logits.vocabulary, [&](int token, float logit) {
            first = smaller(first, static_cast<uint64_t>(place_of(logit)) << 32 | static_cast<unsigned>(token));
        });
        likeliest = static_cast<int>(of_block(m, first, smaller) & 0xffffffffu);
        peak = logits[likeliest], temperature = f.temperature, lightest = 0.f;
        last_place = ~0u, last_id = logits.vocabulary;
        if (peak != peak) return Verdict::nan_logits;
        if (peak == -HUGE_VALF) return Verdict::no_token;
        if (temperature == 0.f) return Verdict::ok;
        if (peak == HUGE_VALF) return Verdict::infinite_logits;
        if (0 < f.top_k && f.top_k < logits.vocabulary)
            keep(m, static_cast<uint64_t>(f.top_k), [](float) { return uint64_t{1}; });
        if (f.top_p < 1.f) {
            const double enough = (static_cast<double>(f.top_p) - kRounding) * static_cast<double>(total(m));
            keep(m, enough > 1 ? static_cast<uint64_t>(ceil(enough)) : 1,
                 [](float weight) { return to_units(weight); });
        }
        lightest = static_cast<float>(f.min_p * (1 - kRounding));
        return Verdict::ok;
    }
};

}  // namespace
}  // namespace speculative_mamba::cuda
