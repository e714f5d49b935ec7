// A work item is one row and one kv head with all the queries that read it: a block of keys and values is widened to
// float32 once, while it lies in the nearest cache, and serves every query head and token of the window. Blocks start
// at fixed positions, lanes run over the dimensions of a head, and entries are added in the order of their positions;
// so what a token adds up, and in which order, follows from its position alone.
#include <cmath>

#include "../params.h"
#include "buffer.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {
namespace {

constexpr int kBlock = 2 * kLanes;  // entries of the cache
constexpr int64_t kSegment = 64;    // tokens that share a pass over the cache: their queries stay in a core's own cache

// Where each row starts, and the rotation of each of its tokens. In a row that is left out all columns are null.
struct Window {
    int64_t *length, *left_padding;  // (B)
    float *cos, *sin;                // (B, T, R)
};

struct Scratch {
    Buffer keys, values;        // (kBlock, P rounded up to full vectors)
    Buffer queries, sums;       // (queries of a segment, as above)
    Buffer running_max, total;  // (queries): of the scores so far, of the weights so far
    Buffer rotated;             // (P)
};

inline int64_t padded(int64_t dims) { return divide_up(dims, kLanes) * kLanes; }

// Entry i+R of a head is the partner of entry i.
inline void rotate(const float* in, const float* cos, const float* sin, int64_t pairs, int64_t dims, float* out) {
    for (int64_t i = 0; i < pairs; i++) {
        const float a = in[i], b = in[i + pairs];
        out[i] = a * cos[i] - b * sin[i];
        out[i + pairs] = b * cos[i] + a * sin[i];
    }
    for (int64_t i = 2 * pairs; i < dims; i++) out[i] = in[i];
}

// Rounds to the dtype of the cache: what the token itself and every later one will read.
template <typename Cache>
inline void write(const float* in, int64_t dims, Cache* out) {
    for (int64_t d = 0; d < dims; d += kLanes) {
        const int64_t lanes = min(kLanes, dims - d);
        store_n(out + d, load_n(in + d, lanes), lanes);
    }
}

// `count` entries as float32, the lanes behind a head's last dimension 0.
template <typename Cache>
inline void widen_block(const Cache* in, int64_t count, int64_t dims, float* out) {
    const int64_t stride = padded(dims), full = dims / kLanes * kLanes;
    for (int64_t e = 0; e < count; e++) {
        for (int64_t d = 0; d < full; d += kLanes) store(out + e * stride + d, load(in + e * dims + d));
        if (full < dims) store(out + e * stride + full, load_partial(in + e * dims + full, dims - full));
    }
}

// query · key for E entries.
template <int E>
inline void scores_of(const float* query, const float* keys, int64_t stride, float* scores) {
    Vec sums[E];
    for (int e = 0; e < E; e++) sums[e] = zero();
    for (int64_t d = 0; d < stride; d += kLanes) {
        const Vec q = load(query + d);
        for (int e = 0; e < E; e++) sums[e] = fma(q, load(keys + e * stride + d), sums[e]);
    }
    for (int e = 0; e < E; e++) scores[e] = sum(sums[e]);
}

// Rescales V vectors of a query's sum and adds the weighted values of a block to them. The block is added up by itself
// first, which rounds less than one long sum does.
template <int V>
inline void add_values(const float* weights, int64_t count, const float* values, int64_t stride, Vec rescale,
                       float* sums) {
    Vec block[V];
    for (int v = 0; v < V; v++) block[v] = zero();
    for (int64_t e = 0; e < count; e++) {
        const Vec weight = broadcast(weights[e]);
        for (int v = 0; v < V; v++) block[v] = fma(weight, load(values + e * stride + v * kLanes), block[v]);
    }
    for (int v = 0; v < V; v++) store(sums + v * kLanes, fma(load(sums + v * kLanes), rescale, block[v]));
}

inline float reduce_max(Vec a) {
    alignas(64) float lanes[kLanes];
    store(lanes, a);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

inline float exp_of(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp(broadcast(x)));
    return lanes[0];
}

// One query on the first `count` entries of a block.
inline void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t stride,
                   float& running_max, float& total, float* sums) {
    alignas(64) float scores[kBlock], weights[kBlock];
    int64_t e = 0;
    for (; e + 4 <= count; e += 4) scores_of<4>(query, keys + e * stride, stride, scores + e);
    for (; e < count; e++) scores_of<1>(query, keys + e * stride, stride, scores + e);
    for (; e < kBlock; e++) scores[e] = scores[0];  // does not change the maximum; the weights end at `count`

    const float before = running_max, here = reduce_max(max(load(scores), load(scores + kLanes)));
    running_max = here > before ? here : before;
    const Vec shift = broadcast(running_max);
    store(weights, exp(sub(load(scores), shift)));
    store(weights + kLanes, exp(sub(load(scores + kLanes), shift)));
    const int64_t low = min(kLanes, count);
    const Vec all = add(load_n(weights, low), load_n(weights + kLanes, count - low));
    const float rescale = exp_of(before - running_max);
    total = total * rescale + sum(all);

    int64_t d = 0;
    for (; d + 4 * kLanes <= stride; d += 4 * kLanes)
        add_values<4>(weights, count, values + d, stride, broadcast(rescale), sums + d);
    for (; d < stride; d += kLanes) add_values<1>(weights, count, values + d, stride, broadcast(rescale), sums + d);
}

struct Item {
    int64_t row, head;             // of the cache
    int64_t length, left_padding;  // entries before the window; leading tokens that count as nothing
    const float *cos, *sin;        // (T, R)
};

// Tokens [first, last) of the window; their keys and values have been written.
template <typename Cache>
void segment(const AttentionParams& p, const Item& item, const Cache* keys, const Cache* values, int64_t first,
             int64_t last, Scratch& s) {
    const int64_t group = p.heads / p.kv_heads, stride = padded(p.dims), queries = (last - first) * group;
    float* key_block = s.keys.reserve<float>(kBlock * stride);
    float* value_block = s.values.reserve<float>(kBlock * stride);
    float* query = s.queries.reserve<float>(queries * stride);
    float* sums = s.sums.reserve<float>(queries * stride);
    float* running_max = s.running_max.reserve<float>(queries);
    float* total = s.total.reserve<float>(queries);

    for (int64_t i = 0; i < queries; i++) {
        const int64_t t = first + i / group, head = item.head * group + i % group;
        const float* q = p.q + item.row * p.q_batch_stride + t * p.q_token_stride + head * p.dims;
        float* out = query + i * stride;
        rotate(q, item.cos + t * p.pairs, item.sin + t * p.pairs, p.pairs, p.dims, out);
        for (int64_t d = 0; d < p.dims; d++) out[d] *= p.scale;
        for (int64_t d = p.dims; d < stride; d++) out[d] = 0.f;
        for (int64_t d = 0; d < stride; d++) sums[i * stride + d] = 0.f;
        running_max[i] = -HUGE_VALF;
        total[i] = 0.f;
    }
    const int64_t begin = item.length - item.left_padding;  // token t is at position begin + t
    for (int64_t block = 0; block < begin + last; block += kBlock) {
        const int64_t present = min(kBlock, begin + last - block);
        widen_block(keys + block * p.dims, present, p.dims, key_block);
        widen_block(values + block * p.dims, present, p.dims, value_block);
        const int64_t from = block - begin > first ? block - begin : first;  // earlier tokens end before this block
        for (int64_t i = (from - first) * group; i < queries; i++) {
            const int64_t count = min(present, begin + first + i / group + 1 - block);
            attend(query + i * stride, key_block, value_block, count, stride, running_max[i], total[i],
                   sums + i * stride);
        }
    }
    for (int64_t i = 0; i < queries; i++) {
        const int64_t t = first + i / group, head = item.head * group + i % group;
        float* y = p.y + ((item.row * p.tokens + t) * p.heads + head) * p.dims;
        for (int64_t d = 0; d < p.dims; d++) y[d] = sums[i * stride + d] / total[i];
    }
}

template <typename Cache>
void head(const AttentionParams& p, const Item& item) {
    thread_local Scratch scratch;
    const int64_t group = p.heads / p.kv_heads;
    Cache* keys = static_cast<Cache*>(p.keys) + item.row * p.keys_batch_stride + item.head * p.keys_head_stride;
    Cache* values = static_cast<Cache*>(p.values) + item.row * p.values_batch_stride + item.head * p.values_head_stride;

    float* rotated = scratch.rotated.reserve<float>(p.dims);
    for (int64_t t = item.left_padding; t < p.tokens; t++) {
        const float* k = p.k + item.row * p.k_batch_stride + t * p.k_token_stride + item.head * p.dims;
        const float* v = p.v + item.row * p.v_batch_stride + t * p.v_token_stride + item.head * p.dims;
        const int64_t entry = item.length - item.left_padding + t;
        rotate(k, item.cos + t * p.pairs, item.sin + t * p.pairs, p.pairs, p.dims, rotated);
        write(rotated, p.dims, keys + entry * p.dims);
        write(v, p.dims, values + entry * p.dims);
    }
    for (int64_t t = 0; t < item.left_padding; t++) {
        float* y = p.y + ((item.row * p.tokens + t) * p.heads + item.head * group) * p.dims;
        for (int64_t d = 0; d < group * p.dims; d++) y[d] = 0.f;
    }
    for (int64_t first = item.left_padding; first < p.tokens; first += kSegment)
        segment<Cache>(p, item, keys, values, first, min(first + kSegment, p.tokens), scratch);
}

// Everything that is read from `lengths`, before any of it is written; sines and cosines serve all heads.
Window prepare(const AttentionParams& p) {
    thread_local Buffer length, left_padding, cos, sin;
    const int64_t angles = p.batch * p.tokens * p.pairs;
    const Window w{length.reserve<int64_t>(p.batch), left_padding.reserve<int64_t>(p.batch), cos.reserve<float>(angles),
                   sin.reserve<float>(angles)};
    for (int64_t b = 0; b < p.batch; b++) {
        const bool left_out = p.start_slot[b] < 0;
        w.length[b] = left_out ? 0 : p.lengths[b * p.slots + p.start_slot[b]];
        const int64_t count = left_out ? p.tokens : p.left_padding ? p.left_padding[b] : 0;
        w.left_padding[b] = count > 0 ? min(count, p.tokens) : 0;
        for (int64_t t = w.left_padding[b]; t < p.tokens; t++) {
            const float position = static_cast<float>(w.length[b] + t - w.left_padding[b]);
            for (int64_t i = 0; i < p.pairs; i++) {
                const float angle = position * p.inv_freq[i];
                w.cos[(b * p.tokens + t) * p.pairs + i] = std::cos(angle);
                w.sin[(b * p.tokens + t) * p.pairs + i] = std::sin(angle);
            }
        }
    }
    return w;
}

void write_lengths(const AttentionParams& p, const Window& w) {
    for (int64_t b = 0; b < p.batch; b++) {
        if (p.start_slot[b] < 0) continue;
        for (int64_t t = p.final_state_only ? p.tokens - 1 : 0; t < p.tokens; t++) {
            const int64_t slot = p.final_state_only ? 0 : p.write_slot + t, taken = t + 1 - w.left_padding[b];
            p.lengths[b * p.slots + slot] = static_cast<int32_t>(w.length[b] + (taken > 0 ? taken : 0));
        }
    }
}

template <typename Cache>
void run(const AttentionParams& p, int threads) {
    const Window w = prepare(p);
    const int64_t items = p.batch * p.kv_heads;
    int64_t work = 0;
    for (int64_t b = 0; b < p.batch; b++) work += (w.length[b] + p.tokens) * p.tokens * p.heads * p.dims * 2;
    parallel_for(items, 1, work, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t b = i / p.kv_heads, angles = b * p.tokens * p.pairs;
            head<Cache>(p, {b, i % p.kv_heads, w.length[b], w.left_padding[b], w.cos + angles, w.sin + angles});
        }
    });
    write_lengths(p, w);
}

}  // namespace

void attention_verify(const AttentionParams& p, int threads) {
    SM_DISPATCH_DTYPE(p.keys_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
