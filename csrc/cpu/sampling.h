// From a row of logits to the probabilities that are sampled: bias, penalties, temperature, top-k, top-p, min-p.
#pragma once

#include "../params.h"
#include "buffer.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {
namespace {

// The parameters of one row.
struct RowSampling {
    float temperature, top_p, min_p;
    int64_t top_k;
    float repetition_penalty = 1.f, presence_penalty = 0.f, frequency_penalty = 0.f;
    const int32_t* bias_ids = nullptr;
    const float* bias_values = nullptr;
    int64_t bias_count = 0;

    RowSampling(const SamplingTensors& s, int64_t b)
        : temperature(s.temperature[b]), top_p(s.top_p[b]), min_p(s.min_p[b]), top_k(s.top_k[b]) {
        if (s.repetition_penalty) {
            repetition_penalty = s.repetition_penalty[b];
            presence_penalty = s.presence_penalty[b];
            frequency_penalty = s.frequency_penalty[b];
        }
        bias_ids = s.bias_ids + b * s.bias_capacity;
        bias_values = s.bias_values + b * s.bias_capacity;
        while (bias_count < s.bias_capacity && bias_ids[bias_count] >= 0) bias_count++;
    }

    bool greedy() const { return temperature == 0; }
    bool penalised() const { return repetition_penalty != 1.f || presence_penalty != 0.f || frequency_penalty != 0.f; }
};

// Entry i is token ids[i], or token i where ids is null; its probability is weights[i] · scale.
struct Probs {
    const int32_t* ids;
    const float* weights;
    int64_t count;
    float scale;

    float operator[](int64_t token) const {
        if (!ids) return weights[token] * scale;
        for (int64_t i = 0; i < count; i++)
            if (ids[i] == token) return weights[i] * scale;
        return 0.f;
    }

    // All of them, to out (V).
    void store(float* out, int64_t vocabulary) const {
        if (ids) std::memset(out, 0, vocabulary * sizeof(float));
        for (int64_t i = 0; i < count; i++) out[ids ? ids[i] : i] = weights[i] * scale;
    }
};

// Memory of one thread, kept between calls.
struct Scratch {
    float *logits, *weights;
    int32_t* ids;
    uint32_t *keys, *other_keys;
    int32_t* other_ids;
};

inline Scratch scratch(int64_t vocabulary) {
    thread_local Buffer buffer;
    const int64_t part = divide_up(vocabulary, kLanes) * kLanes * 4;
    char* memory = buffer.reserve<char>(6 * part);
    auto at = [&](int i) { return static_cast<void*>(memory + i * part); };
    return {static_cast<float*>(at(0)),    static_cast<float*>(at(1)),    static_cast<int32_t*>(at(2)),
            static_cast<uint32_t*>(at(3)), static_cast<uint32_t*>(at(4)), static_cast<int32_t*>(at(5))};
}

// A logit after the penalties, of a token that was generated so often; or else it stands in the prompt.
inline float penalised(float logit, int32_t count, const RowSampling& row) {
    const float lowered = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (count <= 0) return lowered;
    return lowered - row.frequency_penalty * static_cast<float>(count) - row.presence_penalty;
}

// Logits after bias and penalties, in that order. A token counts as generated output_counts (V) times, and once more
// for each of the window's tokens before this position, `drafted` of them.
inline const float* adjusted(const float* logits, int64_t vocabulary, const RowSampling& row, const bool* prompt_mask,
                             const int32_t* output_counts, const int64_t* draft_tokens, int64_t drafted,
                             const Scratch& s) {
    if (!row.penalised() && row.bias_count == 0) return logits;
    std::memcpy(s.logits, logits, vocabulary * sizeof(float));
    for (int64_t i = 0; i < row.bias_count; i++)
        if (row.bias_ids[i] < vocabulary) s.logits[row.bias_ids[i]] += row.bias_values[i];
    if (!row.penalised()) return s.logits;
    constexpr int64_t kPart = 16;  // tokens that are skipped together where the text holds none of them
    for (int64_t first = 0; first < vocabulary; first += kPart) {
        const int64_t last = min(vocabulary, first + kPart);
        if (last - first == kPart) {
            uint64_t words[kPart / 8], marked = 0;
            std::memcpy(words, prompt_mask + first, sizeof words);
            for (const uint64_t word : words) marked |= word;
            int32_t counted = 0;
            for (int64_t i = 0; i < kPart; i++) counted |= output_counts[first + i];
            if (marked == 0 && counted == 0) continue;
        }
        for (int64_t i = first; i < last; i++)
            if (output_counts[i] > 0 || prompt_mask[i]) s.logits[i] = penalised(s.logits[i], output_counts[i], row);
    }
    for (int64_t i = 0; i < drafted; i++) {
        const int64_t token = draft_tokens[i];
        int32_t count = output_counts[token];
        for (int64_t other = 0; other < drafted; other++) count += draft_tokens[other] == token;
        float logit = logits[token];
        for (int64_t at = 0; at < row.bias_count; at++)
            if (row.bias_ids[at] == token) logit += row.bias_values[at];
        s.logits[token] = penalised(logit, count, row);
    }
    return s.logits;
}

struct Extremes {
    float max;
    bool has_nan;
};

inline Extremes extremes(const float* x, int64_t size) {
    const Vec one = broadcast(1.f), minus_one = broadcast(-1.f);
    Vec largest = broadcast(-__builtin_inff()), clamped = zero();  // a sum of clamped values is NaN if any value is
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Vec value = load(x + i);
        largest = max(value, largest);
        clamped = add(clamped, max(minus_one, min(one, value)));
    }
    float lanes[kLanes], result = -__builtin_inff(), check = sum(clamped);
    store(lanes, largest);
    for (float lane : lanes) result = lane > result ? lane : result;
    for (; i < size; i++) {
        result = x[i] > result ? x[i] : result;
        check += x[i] != x[i] ? x[i] : 0.f;
    }
    return {result, check != check};
}

// The first token of the largest logit.
inline int64_t first_of(const float* x, int64_t size, float value) {
    int64_t i = 0;
    while (i + kLanes <= size && !any_equal(load(x + i), broadcast(value))) i += kLanes;
    while (x[i] != value) i++;
    return i;
}

// Blocks are summed in float, the sums of blocks in double, so that a long tail is not lost.
constexpr int64_t kBlock = 32 * kLanes;

inline double total(const float* x, int64_t size) {
    double result = 0;
    for (int64_t first = 0; first < size; first += kBlock) {
        const int64_t last = min(size, first + kBlock);
        Vec block = zero();
        for (int64_t i = first; i < last; i += kLanes) block = add(block, load_n(x + i, min(kLanes, last - i)));
        result += sum(block);
    }
    return result;
}

// exp((x - max) / temperature), exactly 0 from exp(-87) downwards.
inline void exponentials(const float* x, int64_t size, float max, float temperature, float* out) {
    const Vec peak = broadcast(max), divisor = broadcast(temperature), floor = exp(broadcast(-87.f));
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t count = min(kLanes, size - i);
        store_n(out + i, sub(exp(div(sub(load_n(x + i, count), peak), divisor)), floor), count);
    }
}

inline bool worse(const float* x, int32_t a, int32_t b) { return x[a] < x[b] || (x[a] == x[b] && a > b); }

// Restores a heap with the worst on top after its entry `at` has changed.
inline void sift(const float* x, int32_t* heap, int64_t size, int64_t at) {
    const int32_t id = heap[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && worse(x, heap[child + 1], heap[child])) child++;
        if (!worse(x, heap[child], id)) break;
        heap[at] = heap[child];
    }
    heap[at] = id;
}

inline void largest_by_heap(const float* x, int64_t size, int64_t count, int32_t* ids) {
    for (int64_t i = 0; i < count; i++) ids[i] = static_cast<int32_t>(i);
    for (int64_t at = count / 2; at-- > 0;) sift(x, ids, count, at);
    for (int64_t i = count; i < size;) {
        const int64_t last = min(size, i + kLanes);
        if (last == i + kLanes && !any_greater(load(x + i), broadcast(x[ids[0]]))) {
            i = last;
            continue;
        }
        for (; i < last; i++) {
            if (!(x[i] > x[ids[0]])) continue;
            ids[0] = static_cast<int32_t>(i);
            sift(x, ids, count, 0);
        }
    }
    for (int64_t last = count; --last > 0;) {
        const int32_t worst = ids[0];
        ids[0] = ids[last], ids[last] = worst;
        sift(x, ids, last, 0);
    }
}

// All ids in descending order of x, by a stable radix sort.
inline void sort_all(const float* x, int64_t size, const Scratch& s) {
    uint32_t *keys = s.keys, *other_keys = s.other_keys;
    int32_t *ids = s.ids, *other_ids = s.other_ids;
    for (int64_t i = 0; i < size; i++) {
        const float value = x[i] + 0.f;  // -0 becomes 0
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        keys[i] = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
        ids[i] = static_cast<int32_t>(i);
    }
    for (int shift = 0; shift < 32; shift += 8) {
        int64_t starts[256] = {};
        for (int64_t i = 0; i < size; i++) starts[keys[i] >> shift & 255]++;
        for (int64_t digit = 0, start = 0; digit < 256; digit++) {
            const int64_t count = starts[digit];
            starts[digit] = start, start += count;
        }
        for (int64_t i = 0; i < size; i++) {
            const int64_t to = starts[keys[i] >> shift & 255]++;
            other_keys[to] = keys[i], other_ids[to] = ids[i];
        }
        uint32_t* k = keys;
        keys = other_keys, other_keys = k;
        int32_t* o = ids;
        ids = other_ids, other_ids = o;
    }
}

constexpr int64_t kMaxHeap = 1024;

// The k likeliest tokens, of them the fewest that reach p, of them those of at least min_p times the largest.
inline Probs top_tokens(const float* x, int64_t vocabulary, float max, const RowSampling& row, const Scratch& s) {
    const bool by_rank = 0 < row.top_k && row.top_k < vocabulary;
    double all = 0;
    if (!by_rank) {
        exponentials(x, vocabulary, max, row.temperature, s.weights);
        all = total(s.weights, vocabulary);
    }
    for (int64_t count = by_rank ? row.top_k : min(kMaxHeap, vocabulary);; count = vocabulary) {
        if (count <= kMaxHeap) {
            largest_by_heap(x, vocabulary, count, s.ids);
        } else {
            sort_all(x, vocabulary, s);
        }
        float* gathered = reinterpret_cast<float*>(s.other_keys);
        for (int64_t i = 0; i < count; i++) gathered[i] = x[s.ids[i]];
        exponentials(gathered, count, max, row.temperature, s.weights);
        if (by_rank) all = total(s.weights, count);
        int64_t kept = count;
        if (row.top_p < 1.f) {
            const double enough = (static_cast<double>(row.top_p) - kRounding) * all;
            double reached = s.weights[0];
            for (kept = 1; kept < count && reached < enough; kept++) reached += s.weights[kept];
            if (reached < enough && !by_rank && count < vocabulary) continue;
        }
        while (kept > 1 && (s.weights[kept - 1] < row.min_p * (1 - kRounding) || s.weights[kept - 1] == 0)) kept--;
        const float scale = static_cast<float>(1 / total(s.weights, kept));
        if (kept <= kMaxHeap) return {s.ids, s.weights, kept, scale};
        float* in_order = reinterpret_cast<float*>(s.keys);
        std::memset(in_order, 0, vocabulary * sizeof(float));
        for (int64_t i = 0; i < kept; i++) in_order[s.ids[i]] = s.weights[i];
        return {nullptr, in_order, vocabulary, scale};
    }
}

inline Probs all_tokens(const float* x, int64_t vocabulary, float max, const RowSampling& row, const Scratch& s) {
    exponentials(x, vocabulary, max, row.temperature, s.weights);
    if (row.min_p > 0) {
        const float threshold = static_cast<float>(row.min_p * (1 - kRounding));
        for (int64_t i = 0; i < vocabulary; i++) s.weights[i] = s.weights[i] >= threshold ? s.weights[i] : 0.f;
    }
    return {nullptr, s.weights, vocabulary, static_cast<float>(1 / total(s.weights, vocabulary))};
}

// The probabilities of one row of adjusted logits; for greedy decoding one token.
inline RowStatus make_probs(const float* x, int64_t vocabulary, const RowSampling& row, const Scratch& s,
                            Probs& probs) {
    const Extremes e = extremes(x, vocabulary);
    if (e.has_nan) return RowStatus::nan_logits;
    if (e.max == -__builtin_inff()) return RowStatus::no_token;
    if (row.greedy()) {
        s.ids[0] = static_cast<int32_t>(first_of(x, vocabulary, e.max)), s.weights[0] = 1.f;
        probs = {s.ids, s.weights, 1, 1.f};
        return RowStatus::ok;
    }
    if (e.max == __builtin_inff()) return RowStatus::infinite_logits;
    const bool some = (0 < row.top_k && row.top_k < vocabulary) || row.top_p < 1;
    probs = (some ? top_tokens : all_tokens)(x, vocabulary, e.max, row, s);
    return RowStatus::ok;
}

}  // namespace
}  // namespace speculative_mamba::SM_ISA
