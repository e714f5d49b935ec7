// Three launches. The first rotates queries and stores the window's keys and values; in the second a block takes a
// split of a head's entries against up to eight queries that read it, in the third the splits of a query are added up.
//
// Entries lie in chunks at fixed positions. Split s takes chunks s, s + kSplits, s + 2 kSplits, …, and the order within
// and among them is fixed. So what a token adds up, and in which order, follows from its position alone.
#include "device.cuh"
#include "kernels.h"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kHeadThreads = 128;  // where the threads of a block share the dimensions of a head
constexpr int kChunk = kThreads;   // entries: a thread for each score
constexpr int kQueries = kWarps;   // at most, that share a block: a warp for each softmax
constexpr int kMaxDims = 256, kMaxParts = kMaxDims / 4;
constexpr int64_t kSegment = 64;  // tokens at most that share the second and the third launch; bounds the memory
constexpr int64_t kSplits = 64;   // at most, whatever the capacity; bounds the memory

// Memory between the launches, in this order.
struct Scratch {
    int64_t segment, splits;  // S = min(T, kSegment), C = min(chunks of the cache, kSplits)
    float* queries;           // (B, T, H, P): rotated and scaled
    float* sums;              // (B, S, H, C, P): weighted values of a split
    float* softmax;           // (B, S, H, C, 4): largest score of a split and the sum of its weights; what its last
                              // chunk multiplied the sums by that lay there, and its own
    int32_t* begin;           // (B): token t of the window is at position begin + t
    int64_t bytes;            // of all

    explicit Scratch(const AttentionParams& p) : segment(p.tokens < kSegment ? p.tokens : kSegment) {
        const int64_t chunks = (p.capacity + kChunk - 1) / kChunk;
        splits = chunks < kSplits ? chunks : kSplits;
        const int64_t results = p.batch * segment * p.heads * splits;
        const int64_t sums_at = p.batch * p.tokens * p.heads * p.dims, softmax_at = sums_at + results * p.dims;
        const int64_t begin_at = softmax_at + results * 4;
        queries = p.scratch;
        sums = p.scratch + sums_at;
        softmax = p.scratch + softmax_at;
        begin = reinterpret_cast<int32_t*>(p.scratch + begin_at);
        bytes = (begin_at + p.batch) * static_cast<int64_t>(sizeof(float));
    }
    // Which of the results a query's first split is, t counted from the start of the segment.
    __device__ int64_t result(const AttentionParams& p, int64_t row, int64_t t, int64_t head) const {
        return ((row * segment + t) * p.heads + head) * splits;
    }
};

// All columns of a row that is left out.
__device__ __forceinline__ int64_t limited_padding(const AttentionParams& p, int64_t row) {
    if (load_raw(p.start_slot + row) < 0) return p.tokens;
    const int64_t count = p.left_padding ? load_raw(p.left_padding + row) : 0;
    return count < 0 ? 0 : count < p.tokens ? count : p.tokens;
}

// Sine and cosine of any angle, by quarter turns. The runtime's own need memory for the largest.
__device__ __forceinline__ void sin_cos(float angle, float& sin, float& cos) {
    const double half_turns = static_cast<double>(angle) * 0.318309886183790672, quarters = rint(2 * half_turns);
    const float rest = static_cast<float>(half_turns - 0.5 * quarters);
    const auto quarter = static_cast<int64_t>(quarters);
    const float s = sinpif(rest), c = cospif(rest);
    sin = quarter & 1 ? c : s, cos = quarter & 1 ? s : c;
    if (quarter & 2) sin = -sin;
    if ((quarter + 1) & 2) cos = -cos;
}

// Entry i+R of a head is the partner of entry i.
template <typename Act, typename Out>
__device__ __forceinline__ void rotate(const AttentionParams& p, const Act* in, float position, float scale, Out* out) {
    for (int64_t i = threadIdx.x; i < p.pairs; i += kHeadThreads) {
        const float a = load(in + i), b = load(in + i + p.pairs);
        float sin, cos;
        sin_cos(position * load(p.inv_freq + i), sin, cos);
        store(out + i, (a * cos - b * sin) * scale);
        store(out + i + p.pairs, (b * cos + a * sin) * scale);
    }
    for (int64_t i = 2 * p.pairs + threadIdx.x; i < p.dims; i += kHeadThreads) store(out + i, load(in + i) * scale);
}

// A block for each head of q, then for each of k and v.
template <typename Act, typename Cache>
__global__ void __launch_bounds__(kHeadThreads) prepare(AttentionParams p, Scratch s) {
    wait_for_previous();
    const int64_t t = blockIdx.x, head = blockIdx.y, row = blockIdx.z, left_padding = limited_padding(p, row);
    const int64_t start = load_raw(p.start_slot + row);
    const int64_t begin = (start < 0 ? 0 : load_raw(p.lengths + row * p.slots + start)) - left_padding;
    if (t == 0 && head == 0 && threadIdx.x == 0) store_raw(s.begin + row, static_cast<int32_t>(begin));
    if (t < left_padding) return;
    const float position = static_cast<float>(begin + t);
    if (head < p.heads) {
        const Act* q = reinterpret_cast<const Act*>(p.q) + row * p.q_batch_stride + t * p.q_token_stride;
        float* query = s.queries + ((row * p.tokens + t) * p.heads + head) * p.dims;
        return rotate(p, q + head * p.dims, position, p.scale, query);
    }
    const int64_t kv = head - p.heads, entry = (begin + t) * p.dims;
    const Act* k = reinterpret_cast<const Act*>(p.k) + row * p.k_batch_stride + t * p.k_token_stride + kv * p.dims;
    const Act* v = reinterpret_cast<const Act*>(p.v) + row * p.v_batch_stride + t * p.v_token_stride + kv * p.dims;
    Cache* key = static_cast<Cache*>(p.keys) + row * p.keys_batch_stride + kv * p.keys_head_stride + entry;
    Cache* value = static_cast<Cache*>(p.values) + row * p.values_batch_stride + kv * p.values_head_stride + entry;
    rotate(p, k, position, 1.f, key);
    for (int64_t i = threadIdx.x; i < p.dims; i += kHeadThreads) store(value + i, load(v + i));
}

// A block takes Q of the queries that tokens [token, token + tokens) have for a kv head.
template <typename Cache, int Q>
__global__ void __launch_bounds__(kThreads, 2) attend(AttentionParams p, Scratch s, int64_t token, int64_t tokens) {
    SM_SHARED(Float4, queries, Q * kMaxParts);
    SM_SHARED(float, weights, kChunk* Q);  // (entries, queries); at first the scores
    SM_SHARED(Float4, sums, Q * kThreads);
    wait_for_previous();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const int64_t split = blockIdx.x, kv = blockIdx.y % p.kv_heads, row = blockIdx.z, group = p.heads / p.kv_heads;
    const int64_t first = blockIdx.y / p.kv_heads * Q, last = tokens * group - 1;
    auto exists = [&](int i) { return first + i <= last; };
    auto t_of = [&](int i) { return token + (exists(i) ? first + i : last) / group; };
    auto head_of = [&](int i) { return kv * group + (exists(i) ? first + i : last) % group; };
    int chunk = static_cast<int>(split);
    const int before = load_raw(s.begin + row) + 1;
    auto seen_by = [&](int i) {  // entries of the chunk
        const int count = before + static_cast<int>(t_of(i)) - chunk * kChunk;
        return count < 0 ? 0 : count < kChunk ? count : kChunk;
    };
    auto result_of = [&](int i) { return s.result(p, row, t_of(i) - token, head_of(i)) + split; };
    if (seen_by(Q - 1) == 0) return;
    const int dims = static_cast<int>(p.dims), parts = (dims + 3) / 4;
    auto width = [&](int part) { return dims - 4 * part < 4 ? dims - 4 * part : 4; };
    int lanes = 8;  // that share an entry's value, four dimensions each
    while (lanes < parts) lanes *= 2;
    const int entries = kThreads / lanes, part = thread % lanes;  // entries at a time

    for (int at = thread; at < Q * parts; at += kThreads) {
        const int i = at / parts, part = at % parts;
        const float* query = s.queries + ((row * p.tokens + t_of(i)) * p.heads + head_of(i)) * p.dims;
        store_raw(queries + i * kMaxParts + part, load4(query + 4 * part, width(part)));
    }
    __syncthreads();

    for (int present; (present = seen_by(Q - 1)) > 0; chunk += static_cast<int>(kSplits)) {
        const int64_t entry = static_cast<int64_t>(chunk) * kChunk * p.dims;
        const Cache* keys =
            static_cast<const Cache*>(p.keys) + row * p.keys_batch_stride + kv * p.keys_head_stride + entry;
        const Cache* values =
            static_cast<const Cache*>(p.values) + row * p.values_batch_stride + kv * p.values_head_stride + entry;
        if (thread < present) {
            Float4 scores[Q] = {};
            for (int part = 0; part < parts; part++) {
                const Float4 k = load4(keys + thread * p.dims + 4 * part, width(part));
#pragma unroll
                for (int i = 0; i < Q; i++) {
                    const Float4 q = load_raw(queries + i * kMaxParts + part);
#pragma unroll
                    for (int j = 0; j < 4; j++) scores[i].v[j] = fmaf(q.v[j], k.v[j], scores[i].v[j]);
                }
            }
#pragma unroll
            for (int i = 0; i < Q; i++) {
                const Float4& score = scores[i];
                store(weights + thread * Q + i, (score.v[0] + score.v[1]) + (score.v[2] + score.v[3]));
            }
        }
        __syncthreads();

        if (warp < Q) {
            const int seen = seen_by(warp);
            float running_max = -HUGE_VALF, total = 0.f;
            for (int e = lane; e < seen; e += kWarp) running_max = fmaxf(running_max, load(weights + e * Q + warp));
            running_max = warp_reduce_max<kWarp>(running_max);
            for (int e = lane; e < seen; e += kWarp) {
                const float weight = expf(load(weights + e * Q + warp) - running_max);
                store(weights + e * Q + warp, weight);
                total += weight;
            }
            total = warp_reduce_sum<kWarp>(total);
            if (lane == 0 && exists(warp)) {
                float* softmax = s.softmax + result_of(warp) * 4;
                if (chunk >= kSplits) {  // a query that sees none of it keeps every bit
                    const float before_max = load(softmax), new_max = fmaxf(before_max, running_max);
                    const float kept = expf(before_max - new_max), added = expf(running_max - new_max);
                    store(softmax + 2, kept);
                    store(softmax + 3, added);
                    total = fmaf(load(softmax + 1), kept, total * added);
                    running_max = new_max;
                }
                store(softmax, running_max);
                store(softmax + 1, total);
            }
        }
        __syncthreads();

        Float4 mine[Q] = {};
        int seen[Q];
#pragma unroll
        for (int i = 0; i < Q; i++) seen[i] = seen_by(i);
        for (int e = thread / lanes; e < present && part < parts; e += entries) {
            const Float4 value = load4(values + e * p.dims + 4 * part, width(part));
#pragma unroll
            for (int i = 0; i < Q; i++) {
                if (e >= seen[i]) continue;
                const float weight = load(weights + e * Q + i);
#pragma unroll
                for (int j = 0; j < 4; j++) mine[i].v[j] = fmaf(weight, value.v[j], mine[i].v[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < Q; i++) store_raw(sums + i * kThreads + thread, mine[i]);
        __syncthreads();
        for (int at = thread; at < Q * lanes; at += kThreads) {
            const int i = at / lanes, part_of_sum = at % lanes;
            if (part_of_sum >= parts || !exists(i)) continue;
            Float4 sum = {};
            for (int e = 0; e < entries; e++) {
                const Float4 next = load_raw(sums + i * kThreads + e * lanes + part_of_sum);
#pragma unroll
                for (int j = 0; j < 4; j++) sum.v[j] += next.v[j];
            }
            float* result = s.sums + result_of(i) * p.dims + 4 * part_of_sum;
            if (chunk >= kSplits) {
                const Float4 before_sum = load4(result, width(part_of_sum));
                const float* softmax = s.softmax + result_of(i) * 4;
                const float kept = load(softmax + 2), added = load(softmax + 3);
#pragma unroll
                for (int j = 0; j < 4; j++) sum.v[j] = fmaf(before_sum.v[j], kept, sum.v[j] * added);
            }
            store4(result, sum, width(part_of_sum));
        }
        __syncthreads();
    }
}

// A block for each query.
template <typename Act>
__global__ void __launch_bounds__(kHeadThreads) combine(AttentionParams p, Scratch s, int64_t token) {
    wait_for_previous();
    const int64_t head = blockIdx.x, t = token + blockIdx.y, row = blockIdx.z, left_padding = limited_padding(p, row);
    const int64_t length = load_raw(s.begin + row) + (t < left_padding ? left_padding : t + 1);
    const bool kept = load_raw(p.start_slot + row) >= 0 && (!p.final_state_only || t + 1 == p.tokens);
    if (head == 0 && threadIdx.x == 0 && kept) {
        const int64_t slot = p.final_state_only ? 0 : p.write_slot + t;
        store_raw(p.lengths + row * p.slots + slot, static_cast<int32_t>(length));
    }
    const int64_t chunks = t < left_padding ? 0 : (length + kChunk - 1) / kChunk;
    const int64_t splits = chunks < kSplits ? chunks : kSplits;
    const float* softmax = s.softmax + s.result(p, row, t - token, head) * 4;
    const float* sums = s.sums + s.result(p, row, t - token, head) * p.dims;
    Act* y = reinterpret_cast<Act*>(p.y) + ((row * p.tokens + t) * p.heads + head) * p.dims;
    float running_max = -HUGE_VALF;
    for (int64_t c = 0; c < splits; c++) running_max = fmaxf(running_max, load(softmax + 4 * c));
    for (int64_t d = threadIdx.x; d < p.dims; d += kHeadThreads) {
        float sum = 0.f, total = 0.f;
        for (int64_t c = 0; c < splits; c++) {
            const float scale = expf(load(softmax + 4 * c) - running_max);
            total = fmaf(load(softmax + 4 * c + 1), scale, total);
            sum = fmaf(load(sums + c * p.dims + d), scale, sum);
        }
        store(y + d, t < left_padding ? 0.f : sum / total);
    }
}

template <typename Cache, int Q>
void attend_all(const AttentionParams& p, const Scratch& s, int64_t token, int64_t tokens, cudaStream_t stream) {
    const unsigned tiles = blocks_for(tokens * (p.heads / p.kv_heads), Q) * static_cast<unsigned>(p.kv_heads);
    const dim3 blocks(static_cast<unsigned>(s.splits), tiles, static_cast<unsigned>(p.batch));
    launch(attend<Cache, Q>, blocks, dim3(kThreads), stream, p, s, token, tokens);
}

template <typename Act, typename Cache>
void run(const AttentionParams& p, cudaStream_t stream) {
    if (p.dims > kMaxDims) throw std::invalid_argument("the CUDA kernel takes up to 256 dimensions a head");
    const Scratch s(p);
    const auto rows = static_cast<unsigned>(p.batch), heads = static_cast<unsigned>(p.heads);
    const dim3 all(static_cast<unsigned>(p.tokens), heads + static_cast<unsigned>(p.kv_heads), rows);
    launch(prepare<Act, Cache>, all, dim3(kHeadThreads), stream, p, s);
    for (int64_t token = 0; token < p.tokens; token += kSegment) {
        const int64_t tokens = p.tokens - token < kSegment ? p.tokens - token : kSegment;
        const int64_t queries = tokens * (p.heads / p.kv_heads);
        auto attend = queries == 1   ? attend_all<Cache, 1>
                      : queries <= 4 ? attend_all<Cache, 4>
                                     : attend_all<Cache, kQueries>;
        attend(p, s, token, tokens, stream);
        launch(combine<Act>, dim3(heads, static_cast<unsigned>(tokens), rows), dim3(kHeadThreads), stream, p, s, token);
    }
}

template <typename Act>
void with_activations(const AttentionParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.keys_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void attention_verify(const AttentionParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda

int64_t speculative_mamba::scratch_bytes(const AttentionParams& p) { return cuda::Scratch(p).bytes; }
