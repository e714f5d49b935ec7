// Three launches. The first rotates queries and stores the window's keys and values; in the second a block takes a
// chunk of a head's entries against up to eight queries that read it, in the third the chunks of a query are added up.
//
// Chunks lie at fixed positions, and the order within and among them is fixed. So what a token adds up, and in which
// order, follows from its position alone.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kChunk = kThreads;  // entries: a thread for each score
constexpr int kQueries = kWarps;  // that share a block: a warp for each softmax
constexpr int kMaxDims = 256, kMaxParts = kMaxDims / 4;
constexpr int64_t kSegment = 64;  // tokens that share the second and the third launch, which bounds the scratch memory

// Memory between the launches, in this order. C chunks hold the whole cache.
struct Scratch {
    int64_t chunks;
    float* queries;  // (B, T, H, P): rotated and scaled
    float* sums;     // (B, min(T, kSegment), H, C, P): of the weighted values of a chunk
    float* softmax;  // (B, min(T, kSegment), H, C, 2): greatest score of a chunk, sum of its weights
    int32_t* begin;  // (B): token t of the window is at position begin + t

    explicit Scratch(const AttentionParams& p) : chunks((p.capacity + kChunk - 1) / kChunk) {
        const int64_t heads = p.batch * (p.tokens < kSegment ? p.tokens : kSegment) * p.heads;
        queries = p.scratch;
        sums = queries + p.batch * p.tokens * p.heads * p.dims;
        softmax = sums + heads * chunks * p.dims;
        begin = reinterpret_cast<int32_t*>(softmax + heads * chunks * 2);
    }
};

__device__ __forceinline__ int64_t null_columns(const AttentionParams& p, int64_t row) {
    const int64_t count = p.null_columns ? load_raw(p.null_columns + row) : 0;
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
    for (int64_t i = threadIdx.x; i < p.pairs; i += kThreads) {
        const float angle = position * load(p.inv_freq + i), a = load(in + i), b = load(in + i + p.pairs);
        float sin, cos;
        sin_cos(angle, sin, cos);
        store(out + i, (a * cos - b * sin) * scale);
        store(out + i + p.pairs, (b * cos + a * sin) * scale);
    }
    for (int64_t i = 2 * p.pairs + threadIdx.x; i < p.dims; i += kThreads) store(out + i, load(in + i) * scale);
}

// A block for each head of q, then for each of k and v.
template <typename Act, typename Cache>
__global__ void __launch_bounds__(kThreads) prepare(AttentionParams p, Scratch s) {
    wait_for_previous();
    const int64_t t = blockIdx.x, row = blockIdx.z, head = blockIdx.y, nulls = null_columns(p, row);
    const int64_t begin = load_raw(p.lengths + row * p.slots + load_raw(p.start_slot + row)) - nulls;
    if (t == 0 && head == 0 && threadIdx.x == 0) store_raw(s.begin + row, static_cast<int32_t>(begin));
    if (t < nulls) return;
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
    for (int64_t i = threadIdx.x; i < p.dims; i += kThreads) store(value + i, load(v + i));
}

// The queries that a block has of a kv head: from `first` on of those of tokens [token, token + tokens).
struct Tile {
    int64_t row, kv, group, token, first, last;

    __device__ int64_t query(int i) const { return first + i < last ? first + i : last; }
    __device__ int64_t token_of(int i) const { return token + query(i) / group; }
    __device__ int64_t head_of(int i) const { return kv * group + query(i) % group; }
};

template <typename Cache, int Q>
__global__ void __launch_bounds__(kThreads) attend(AttentionParams p, Scratch s, int64_t token, int64_t tokens) {
    SM_SHARED(Float4, queries, Q * kMaxParts);
    SM_SHARED(float, weights, kChunk* Q);
    SM_SHARED(Float4, sums, Q * kThreads);
    wait_for_previous();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const int64_t chunk = blockIdx.x, row = blockIdx.z, group = p.heads / p.kv_heads;
    const Tile tile{row, blockIdx.y % p.kv_heads, group, token, blockIdx.y / p.kv_heads * Q, tokens * group - 1};
    // How many entries of the chunk a query sees.
    const int64_t before = load_raw(s.begin + row) + 1 - chunk * kChunk;
    auto seen_by = [&](int i) {
        const int64_t count = before + tile.token_of(i);
        return static_cast<int>(count < kChunk ? count : kChunk);
    };
    const int present = seen_by(Q - 1);
    if (present <= 0) return;
    const int64_t first_entry = chunk * kChunk * p.dims;
    const Cache* keys = static_cast<const Cache*>(p.keys) + row * p.keys_batch_stride + tile.kv * p.keys_head_stride;
    const Cache* values =
        static_cast<const Cache*>(p.values) + row * p.values_batch_stride + tile.kv * p.values_head_stride;
    const int dims = static_cast<int>(p.dims), parts = (dims + 3) / 4;
    auto width = [&](int part) { return dims - 4 * part < 4 ? dims - 4 * part : 4; };

    for (int at = thread; at < Q * parts; at += kThreads) {
        const int i = at / parts, part = at % parts;
        const int64_t head = (row * p.tokens + tile.token_of(i)) * p.heads + tile.head_of(i);
        const float* query = s.queries + head * p.dims + 4 * part;
        store_raw(queries + i * kMaxParts + part, load4(query, width(part)));
    }
    __syncthreads();

    if (thread < present) {
        const Cache* key = keys + first_entry + thread * p.dims;
        Float4 scores[Q] = {};
        for (int part = 0; part < parts; part++) {
            const Float4 k = load4(key + 4 * part, width(part));
#pragma unroll
            for (int i = 0; i < Q; i++) {
                const Float4 q = load_raw(static_cast<const Float4*>(queries + i * kMaxParts + part));
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

    const int64_t results = (row * (p.tokens < kSegment ? p.tokens : kSegment) - token) * p.heads;
    auto result_of = [&](int i) { return (results + tile.token_of(i) * p.heads + tile.head_of(i)) * s.chunks + chunk; };
    if (warp < Q) {
        const int seen = seen_by(warp);
        float greatest = -HUGE_VALF, total = 0.f;
        for (int e = lane; e < seen; e += kWarp) greatest = fmaxf(greatest, load(weights + e * Q + warp));
        greatest = max_of_lanes<kWarp>(greatest);
        for (int e = lane; e < seen; e += kWarp) {
            const float weight = expf(load(weights + e * Q + warp) - greatest);
            store(weights + e * Q + warp, weight);
            total += weight;
        }
        total = sum_of_lanes<kWarp>(total);
        if (lane == 0 && tile.query(warp) == tile.first + warp && seen > 0) {
            store(s.softmax + result_of(warp) * 2, greatest);
            store(s.softmax + result_of(warp) * 2 + 1, total);
        }
    }
    __syncthreads();

    int lanes = 8;  // that share an entry's value
    while (lanes < parts) lanes *= 2;
    const int rows = kThreads / lanes, part = thread % lanes;
    Float4 mine[Q] = {};
    int seen[Q];
#pragma unroll
    for (int i = 0; i < Q; i++) seen[i] = seen_by(i);
    if (part < parts) {
        for (int e = thread / lanes; e < present; e += rows) {
            const Float4 value = load4(values + first_entry + e * p.dims + 4 * part, width(part));
#pragma unroll
            for (int i = 0; i < Q; i++) {
                if (e >= seen[i]) continue;
                const float weight = load(weights + e * Q + i);
#pragma unroll
                for (int j = 0; j < 4; j++) mine[i].v[j] = fmaf(weight, value.v[j], mine[i].v[j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < Q; i++) store_raw(sums + i * kThreads + thread, mine[i]);
    __syncthreads();
    for (int at = thread; at < Q * lanes; at += kThreads) {
        const int i = at / lanes, of = at % lanes;
        if (of >= parts || tile.query(i) != tile.first + i || seen_by(i) <= 0) continue;
        Float4 sum = {};
        for (int r = 0; r < rows; r++) {
            const Float4 next = load_raw(static_cast<const Float4*>(sums + i * kThreads + r * lanes + of));
#pragma unroll
            for (int j = 0; j < 4; j++) sum.v[j] += next.v[j];
        }
        store4(s.sums + result_of(i) * p.dims + 4 * of, sum, width(of));
    }
}

// A block for each query.
template <typename Act>
__global__ void __launch_bounds__(kThreads) combine(AttentionParams p, Scratch s, int64_t token) {
    wait_for_previous();
    const int64_t head = blockIdx.x, t = token + blockIdx.y, row = blockIdx.z, nulls = null_columns(p, row);
    const int64_t begin = load_raw(s.begin + row), length = begin + (t < nulls ? nulls : t + 1);
    if (head == 0 && threadIdx.x == 0) {
        const int64_t slot = p.keep_last ? 0 : p.write_slot + t;
        if (!p.keep_last || t + 1 == p.tokens)
            store_raw(p.lengths + row * p.slots + slot, static_cast<int32_t>(length));
    }
    const int64_t chunks = t < nulls ? 0 : (length + kChunk - 1) / kChunk;
    const int64_t segment = p.tokens < kSegment ? p.tokens : kSegment;
    const int64_t result = ((row * segment + t - token) * p.heads + head) * s.chunks;
    const float *softmax = s.softmax + result * 2, *sums = s.sums + result * p.dims;
    Act* y = reinterpret_cast<Act*>(p.y) + ((row * p.tokens + t) * p.heads + head) * p.dims;
    float greatest = -HUGE_VALF;
    for (int64_t c = 0; c < chunks; c++) greatest = fmaxf(greatest, load(softmax + 2 * c));
    for (int64_t d = threadIdx.x; d < p.dims; d += kThreads) {
        float sum = 0.f, total = 0.f;
        for (int64_t c = 0; c < chunks; c++) {
            const float scale = expf(load(softmax + 2 * c) - greatest);
            total = fmaf(load(softmax + 2 * c + 1), scale, total);
            sum = fmaf(load(sums + c * p.dims + d), scale, sum);
        }
        store(y + d, t < nulls ? 0.f : sum / total);
    }
}

template <typename Cache, int Q>
void tiles(const AttentionParams& p, const Scratch& s, int64_t token, int64_t tokens, cudaStream_t stream) {
    const unsigned tiles = blocks_for(tokens * (p.heads / p.kv_heads), Q) * static_cast<unsigned>(p.kv_heads);
    const dim3 blocks(static_cast<unsigned>(s.chunks), tiles, static_cast<unsigned>(p.batch));
    launch(attend<Cache, Q>, blocks, dim3(kThreads), stream, p, s, token, tokens);
}

template <typename Act, typename Cache>
void run(const AttentionParams& p, cudaStream_t stream) {
    if (p.dims > kMaxDims) throw std::invalid_argument("the CUDA kernel takes up to 256 dimensions a head");
    const Scratch s(p);
    const auto rows = static_cast<unsigned>(p.batch);
    const dim3 all(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.heads + p.kv_heads), rows);
    launch(prepare<Act, Cache>, all, dim3(kThreads), stream, p, s);
    for (int64_t token = 0; token < p.tokens; token += kSegment) {
        const int64_t tokens = p.tokens - token < kSegment ? p.tokens - token : kSegment;
        const int64_t queries = tokens * (p.heads / p.kv_heads);
        auto kernel = queries == 1 ? tiles<Cache, 1> : queries <= 4 ? tiles<Cache, 4> : tiles<Cache, kQueries>;
        kernel(p, s, token, tokens, stream);
        const dim3 results(static_cast<unsigned>(p.heads), static_cast<unsigned>(tokens), rows);
        launch(combine<Act>, results, dim3(kThreads), stream, p, s, token);
    }
}

template <typename Act>
void with_activations(const AttentionParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.cache_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void attention(const AttentionParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
