// From a row of logits to its law and to a token of it, by one block. Nothing is kept of the row: its logits are read
// again for every question. What is summed are whole numbers, so the order of the threads does not matter.
#pragma once

#include "../philox.h"
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp;
constexpr int kDigit = 11, kBins = 1 << kDigit;  // bits of a place that are looked at together
constexpr int kMaxVocabulary = kBins * kBins;
constexpr float kUnits = 0x1p42f;     // of fixed point in a weight of 1
constexpr double kRounding = 1e-6;    // bounds are met up to the rounding of float32
constexpr float kSmallest = -87.f;    // weights of exp(-87) and below count as 0
constexpr int kTokensPerThread = 16;  // at least, as far as that leaves a warp

// Memory of a block.
struct Memory {
    unsigned *low, *high;  // (kBins): 64-bit sums in two halves, of which adding is fast
    uint64_t* of_warp;     // (kMaxWarps)
    uint64_t* found;       // (3)
};
#define SM_LAW_MEMORY(memory)                \
    SM_SHARED(unsigned, low, kBins);         \
    SM_SHARED(unsigned, high, kBins);        \
    SM_SHARED(uint64_t, of_warp, kMaxWarps); \
    SM_SHARED(uint64_t, found, 3);           \
    const Memory memory { low, high, of_warp, found }

inline dim3 threads_for(int64_t vocabulary) {
    if (vocabulary > kMaxVocabulary) throw std::invalid_argument("the CUDA kernel takes up to 4194304 tokens");
    unsigned threads = kWarp;
    while (threads < kMaxThreads && threads * kTokensPerThread < vocabulary) threads *= 2;
    return {threads};
}

__device__ __forceinline__ uint64_t to_units(float weight) { return static_cast<uint64_t>(weight * kUnits); }
__device__ __forceinline__ float scale_of(uint64_t total) {
    return static_cast<float>(static_cast<double>(kUnits) / static_cast<double>(total));
}

// The same in every thread.
template <typename Combine>
__device__ __forceinline__ uint64_t of_block(const Memory& m, uint64_t value, Combine combine) {
    const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, mask));
    __syncthreads();
    if (thread % kWarp == 0) store_raw(m.of_warp + thread / kWarp, value);
    __syncthreads();
    value = load_raw(m.of_warp);
    for (int w = 1; w < warps; w++) value = combine(value, load_raw(m.of_warp + w));
    return value;
}
__device__ __forceinline__ uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }
__device__ __forceinline__ uint64_t plus(uint64_t a, uint64_t b) { return a + b; }
__device__ __forceinline__ uint64_t either(uint64_t a, uint64_t b) { return a | b; }

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
    constexpr int kAhead = 4;  // loads that are under way at a time
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

// Sums of measures by bins.
struct Histogram {
    Memory m;

    __device__ void clear() const {
        for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
            store_raw(m.low + i, 0u);
            store_raw(m.high + i, 0u);
        }
        __syncthreads();
    }
    __device__ void add(int bin, uint64_t measure) const {
        const auto low = static_cast<unsigned>(measure);
        const unsigned carry = add_atomically(m.low + bin, low) + low < low;
        const unsigned high = static_cast<unsigned>(measure >> 32) + carry;
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
        uint64_t before = 0, of_warp = sum;  // of lower lanes; of the lanes that have met
#pragma unroll
        for (int mask = 1; mask < kWarp; mask *= 2) {
            const uint64_t other = __shfl_xor_sync(kAllLanes, of_warp, mask);
            of_warp += other;
            if (lane & mask) before += other;
        }
        if (lane == 0) store_raw(m.of_warp + warp, of_warp);
        if (thread == 0) store_raw(m.found, static_cast<uint64_t>(kBins));
        __syncthreads();
        for (int w = 0; w < warp; w++) before += load_raw(m.of_warp + w);
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

// One token from weights, by an exponential race: token i arrives after E / w, E exponential from the noise of the
// token, and the first wins; of equals the lowest id.
struct Race {
    float best = HUGE_VALF;
    int winner = -1;

    __device__ void enter(int token, float weight, uint32_t bits) {
        // -log(1 - v) >= v: most tokens are out of the race before a logarithm is taken.
        if (static_cast<float>(bits >> 8) * 0x1p-24f > best * weight * 1.000001f) return;
        const float arrival = exponential(bits) / weight;
        if (arrival < best || winner < 0) best = arrival, winner = token;
    }
    // -log(1 - v), v = (bits + 0.5) / 2³², accurate at both ends.
    __device__ static float exponential(uint32_t bits) {
        const bool low = bits < 0x80000000u;
        const float rest = (static_cast<float>(low ? bits : ~bits) + 0.5f) * 0x1p-32f;
        return low ? -log1pf(-rest) : -logf(rest);
    }
};

// weight(token) is asked for once, for every token. Where no weight is positive the result means nothing.
template <typename Weight>
__device__ int draw(const Memory& m, int vocabulary, const Noise& noise, Weight weight) {
    Race race;
    // A thread takes four tokens at a time, those that share a counter.
    for (int counter = static_cast<int>(threadIdx.x);; counter += static_cast<int>(blockDim.x)) {
        const int first = counter / 16 * 64 + counter % 16;
        if (first >= vocabulary) break;
        float weights[4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = first + 16 * i;
            weights[i] = token < vocabulary ? weight(token) : 0.f;
            any |= weights[i] > 0.f;
        }
        if (!any) continue;
        uint32_t words[4][1];
        noise.fill<1>(words, static_cast<uint32_t>(counter));
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (weights[i] > 0.f) race.enter(first + 16 * i, weights[i], words[i][0]);
    }
    uint32_t bits;
    memcpy(&bits, &race.best, sizeof bits);
    const uint64_t mine = race.winner < 0 ? ~uint64_t{0} : uint64_t{bits} << 32 | static_cast<unsigned>(race.winner);
    return static_cast<int>(of_block(m, mine, smaller) & 0xffffffffu);
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

    // The token that is drawn, and what makes a weight a probability.
    struct Choice {
        int token;
        float scale;
    };
    __device__ Choice choose(const Memory& m, const Noise& noise) const {
        if (temperature == 0.f) return {likeliest, 1.f};
        uint64_t sum = 0;
        const int token = draw(m, logits.vocabulary, noise, [&](int i) {
            const float result = weight(i);
            sum += to_units(result);
            return result;
        });
        return {token, scale_of(of_block(m, sum, plus))};
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
                const float weight = weight_of(logit);
                const uint64_t place = place_of(logit);
                if (weight == 0.f || place >> known != found || !holds(static_cast<uint32_t>(place), token)) return;
                histogram.add(static_cast<int>(place >> left & ((1u << (known - left)) - 1)), measure(weight));
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
            end = first + width;
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
            keep(m, enough > 1 ? static_cast<uint64_t>(ceil(enough)) : 1, to_units);
        }
        lightest = static_cast<float>(f.min_p * (1 - kRounding));
        return Verdict::ok;
    }
};

}  // namespace
}  // namespace speculative_mamba::cuda
