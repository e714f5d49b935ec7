// Four kernels. Two on tensor cores, where x and W have the same 16 bits, and rows of W are made of full, aligned
// groups of 16 bytes: a block takes tiles of W's rows, and its warps partition the features. For few rows of x see
// linear_few_rows.cuh. By fused multiply-adds otherwise: a warp takes a row of W. Weights in blocks have
// linear_blocks.cuh.
//
// Which features are added up where depends on K, the dtypes and how W lies in memory; how many rows x or a tile has
// does not enter.
#include <algorithm>

#include "copies.cuh"
#include "linear_blocks.cuh"
#include "linear_few_rows.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kMaxRows = 64;  // of x in a launch

// x has up to 8·MmaColumns rows and a tile of W up to 8·MmaRows. A warp has a ring of Depth stages, each of the
// features of so many products: a tile of W, then x.
template <int MmaColumns, int MmaRows, int Products, int Depth>
struct TileConfig {
    static constexpr int kMmaColumns = MmaColumns, kMmaRows = MmaRows, kProducts = Products, kDepth = Depth;
};

// Where things lie in shared memory: the rings of its warps, then twice the warps' sums for eight rows of x.
struct Layout {
    int w_piece, w_bytes, x_piece, stage_bytes, stages, sums_at, sums_stride, sums_size;

    template <typename TileConfig>
    static __host__ __device__ Layout of(int tile_rows, int x_rows, int stages) {
        Layout l;
        l.w_piece = tile_rows * kRowBytes, l.x_piece = x_rows * kRowBytes;
        l.w_bytes = l.w_piece * TileConfig::kProducts;
        l.stage_bytes = l.w_bytes + TileConfig::kProducts * l.x_piece;
        l.stages = stages;
        l.sums_at = kWarps * stages * l.stage_bytes;
        l.sums_stride = tile_rows + 4;  // spreads rows of x over the banks
        l.sums_size = kWarps * kMmaN * l.sums_stride;
        return l;
    }
    int64_t bytes() const { return sums_at + 2 * sums_size * static_cast<int64_t>(sizeof(float)); }
};

// Eight features from where no copy in the background can begin; zeros, where there are none.
template <typename Act>
__device__ __forceinline__ void copy_eight_at_once(char* to, const Act* from, bool exist) {
    Packed8 eight{};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (exist) eight.pairs[i / 2] |= static_cast<uint32_t>(load_raw(from + i).bits) << (i % 2 * 16);
    }
    store_raw(reinterpret_cast<Packed8*>(to), eight);
}

// Lane l copies, and later reads, what lies in quarter l % 4 of pieces of rows l / 4, l / 4 + 8, … of W and of x; no
// other lane needs it.
template <typename Act, typename TileConfig>
__global__ void __launch_bounds__(kWarps* kWarp, TileConfig::kMmaColumns == 1 ? 3 : 1)
    multiply_on_tensor_cores(SkinnyLinearParams p, int64_t m0, int rows, int tile_rows, int stages) {
    SM_LAUNCHED_MEMORY(memory);
    constexpr int kOfLane = kLaneBytes / sizeof(Act);
    const Layout layout = Layout::of<TileConfig>(tile_rows, rows, stages);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const int row = lane / 4, quarter = lane % 4;
    const int k_size = static_cast<int>(p.in_features), first_k = warp * kWarpK, blocks = static_cast<int>(gridDim.x);
    const int tiles = static_cast<int>((p.out_features + tile_rows - 1) / tile_rows);
    const int64_t w_stride = p.weight_row_stride, x_stride = p.x_row_stride;
    char* const ring = memory + warp * stages * layout.stage_bytes + lane * kLaneBytes;
    char* const end_of_ring = ring + stages * layout.stage_bytes;

    // Where the warp is with its copies; of W this lane's part and the rows from there on.
    struct Position {
        int tile, k, rows;
        const Act* weight;
    };
    const auto enter_tile = [&](int tile) {
        const int64_t n = static_cast<int64_t>(tile) * tile_rows + row, left = p.out_features - n;
        const Act* weight = static_cast<const Act*>(p.weight) + n * w_stride + first_k + kOfLane * quarter;
        return Position{first_k < k_size ? tile : tiles, first_k,
                        left < tile_rows - row ? static_cast<int>(left) : tile_rows - row, weight};
    };
    const auto next_k = [](int k) {
        return TileConfig::kProducts == 2 ? k + kWarps * kWarpK
                                          : k + (k % kWarpK == 0 ? kProduct : kWarps * kWarpK - kProduct);
    };
    const auto advance = [&](Position& at) {
        const int k = next_k(at.k);
        at.weight += k - at.k;
        at.k = k;
        if (k >= k_size) at = enter_tile(at.tile + blocks);
    };
    const auto copy_weight = [&](char* stage, const Position& at) {
        const int left = k_size - kOfLane * quarter - at.k;
#pragma unroll
        for (int half = 0; half < TileConfig::kMmaRows; half++) {
            const int r = half * kMmaN;
            if (r >= at.rows) break;
#pragma unroll
            for (int piece = 0; piece < TileConfig::kProducts; piece++) {
                copy_async(stage + piece * layout.w_piece + r * kRowBytes, at.weight + r * w_stride + piece * kProduct,
                           left > piece * kProduct ? kLaneBytes : 0, From::constants);
            }
        }
    };
    const int x_first = kOfLane * quarter;  // where this lane's pieces begin
    const Act* const x = reinterpret_cast<const Act*>(p.x) + (m0 + row) * x_stride + x_first;
    const bool x_aligned = allows_group<8>(reinterpret_cast<const Act*>(p.x)) && x_stride % 8 == 0;
    const auto copy_x = [&](char* stage, int k) {
#pragma unroll
        for (int eight = 0; eight < TileConfig::kMmaColumns; eight++) {
            const int r = eight * kMmaN;
            if (row + r >= rows) break;
#pragma unroll
            for (int piece = 0; piece < TileConfig::kProducts; piece++) {
                const bool exists = k_size - x_first - k > piece * kProduct;
                const Act* from = x + r * x_stride + k + piece * kProduct;
                char* const to = stage + layout.w_bytes + piece * layout.x_piece + r * kRowBytes;
                if (x_aligned) {
                    copy_async(to, from, exists ? kLaneBytes : 0);
                } else {
                    copy_eight_at_once(to, from, exists);
                }
            }
        }
    };

    Position ahead = enter_tile(static_cast<int>(blockIdx.x));
    wait_for_weights(p.constant_weights);
    for (int stage = 0; stage < TileConfig::kDepth; stage++, advance(ahead)) {
        if (ahead.tile < tiles) copy_weight(ring + stage * layout.stage_bytes, ahead);
    }
    // Threads that are left over add up nothing.
    const int result_row = thread % tile_rows, next_column = kWarps * kWarp / tile_rows,
              result_column = thread < next_column * tile_rows ? thread / tile_rows : kMmaN;

    wait_before_next();
    Position of_x = enter_tile(static_cast<int>(blockIdx.x));
    for (int stage = 0; stage < TileConfig::kDepth; stage++, advance(of_x)) {
        if (of_x.tile < tiles) copy_x(ring + stage * layout.stage_bytes, of_x.k);
        end_group_of_copies();
    }
    char* at = ring;
    int turn = 0;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += blocks) {
        const int64_t n = static_cast<int64_t>(tile) * tile_rows + result_row;
        const float bias = p.bias && n < p.out_features ? load(p.bias + n, From::constants) : 0.f;
        float sums[TileConfig::kMmaColumns][(TileConfig::kMmaRows + 1) / 2][4] = {};
        for (int k = first_k; k < k_size; k = next_k(k)) {
            Packed8 w[TileConfig::kMmaRows + TileConfig::kMmaRows % 2][TileConfig::kProducts] = {};
            wait_for_copies<TileConfig::kDepth - 1>();
#pragma unroll
            for (int half = 0; half < TileConfig::kMmaRows; half++) {
                if (row + half * kMmaN >= tile_rows) break;
#pragma unroll
                for (int piece = 0; piece < TileConfig::kProducts; piece++) {
                    w[half][piece] =
                        load_raw(reinterpret_cast<Packed8*>(at + piece * layout.w_piece + half * kMmaN * kRowBytes));
                }
            }
            if (ahead.tile < tiles) copy_weight(at, ahead);
#pragma unroll
            for (int eight = 0; eight < TileConfig::kMmaColumns; eight++) {
                if (eight * kMmaN >= rows) break;
                Packed8 v[TileConfig::kProducts] = {};
                if (row + eight * kMmaN < rows) {
#pragma unroll
                    for (int i = 0; i < TileConfig::kProducts; i++) {
                        v[i] = load_raw(reinterpret_cast<Packed8*>(at + layout.w_bytes + i * layout.x_piece +
                                                                   eight * kMmaN * kRowBytes));
                    }
                }
#pragma unroll
                for (int half = 0; half < TileConfig::kMmaRows; half += 2) {
                    if (half * kMmaN >= tile_rows) break;
#pragma unroll
                    for (int i = 0; i < TileConfig::kProducts; i++) {
                        add_product<Act>(sums[eight][half / 2], w[half][i], w[half + 1][i], v[i]);
                    }
                }
            }
            if (ahead.tile < tiles) copy_x(at, ahead.k);
            end_group_of_copies();
            advance(ahead);
            at = at + layout.stage_bytes == end_of_ring ? ring : at + layout.stage_bytes;
        }
#pragma unroll
        for (int eight = 0; eight < TileConfig::kMmaColumns; eight++) {
            const int columns = rows - eight * kMmaN;
            if (columns <= 0) break;
            // Of two buffers, so that while some threads still add up one, others can fill the other.
            float* const of_warps = reinterpret_cast<float*>(memory + layout.sums_at) + turn * layout.sums_size;
            turn ^= 1;
#pragma unroll
            for (int half = 0; half < TileConfig::kMmaRows; half++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int r = half * kMmaN + row, c = 2 * quarter + i;
                    if (r < tile_rows && c < columns) {
                        store(of_warps + (warp * kMmaN + c) * layout.sums_stride + r,
                              sums[eight][half / 2][half % 2 * 2 + i]);
                    }
                }
            }
            __syncthreads();
            for (int c = result_column; c < kMmaN && c < columns && n < p.out_features; c += next_column) {
                const float total =
                    sum_of_warps(of_warps + c * layout.sums_stride + result_row, kMmaN * layout.sums_stride);
                store_result(p, m0 + eight * kMmaN + c, n, total, bias);
            }
        }
    }
}

// How W is cut into tiles. Of no rows: there is no memory for it.
struct Tiling {
    int tile_rows = 0, stages = 0;
    int64_t cost = INT64_MAX, bytes = 0;
};

// The tiles of at least so many rows with which the slowest block has least to do, in bytes to move: a row of x or a
// product cost about as much as half a row of 16 bits of W, and a tile as much as some thousand bytes.
template <typename Act, typename TileConfig>
Tiling best_tiling(const SkinnyLinearParams& p, int x_rows, int min_rows) {
    constexpr int64_t kProductBytes = 8, kTileBytes = 4096;
    const int64_t memory = max_shared_memory(), blocks = multiprocessors();
    const int64_t stages = blocks_for(p.in_features, kWarps * kWarpK) * (kWarpK / kProduct / TileConfig::kProducts);
    Tiling best;
    for (int tile_rows = kMmaN * TileConfig::kMmaRows; tile_rows >= min_rows; tile_rows--) {
        const int64_t tiles = blocks_for(blocks_for(p.out_features, tile_rows), blocks);
        const int64_t of_feature = tile_rows * static_cast<int64_t>(sizeof(Act)) + x_rows + kProductBytes;
        Tiling t;
        t.tile_rows = tile_rows, t.cost = tiles * (of_feature * p.in_features + kTileBytes);
        t.stages = static_cast<int>(std::min<int64_t>(TileConfig::kDepth, std::max<int64_t>(tiles * stages, 1)));
        t.bytes = Layout::of<TileConfig>(tile_rows, x_rows, t.stages).bytes();
        if (t.bytes <= memory && t.cost < best.cost) best = t;
    }
    return best;
}

template <typename Act, typename TileConfig>
void launch_tiles(const SkinnyLinearParams& p, int64_t m0, int x_rows, const Tiling& t, cudaStream_t stream) {
    const unsigned tiles = blocks_for(p.out_features, t.tile_rows),
                   max_blocks = static_cast<unsigned>(multiprocessors());
    launch_with_memory(multiply_on_tensor_cores<Act, TileConfig>, dim3(std::min(tiles, max_blocks)),
                       dim3(kWarps * kWarp), t.bytes, stream, p, m0, x_rows, t.tile_rows, t.stages);
}

// Whether there was memory enough for so many rows of x.
template <typename Act>
bool start(const SkinnyLinearParams& p, int64_t m0, int x_rows, cudaStream_t stream) {
    using TileM8 = TileConfig<1, 2, 2, 4>;
    using TileM16 = TileConfig<2, 4, 2, 2>;
    using TileM64 = TileConfig<8, 8, 1, 2>;
    if (multiply_in_registers<Act>(p, m0, x_rows, stream)) return true;
    if (x_rows <= kMmaN) {
        launch_tiles<Act, TileM8>(p, m0, x_rows, best_tiling<Act, TileM8>(p, x_rows, 1), stream);
        return true;
    }
    const bool m16 = x_rows <= TileM16::kMmaColumns * kMmaN;
    const Tiling t = m16 ? best_tiling<Act, TileM16>(p, x_rows, 1) : best_tiling<Act, TileM64>(p, x_rows, 1);
    if (t.tile_rows == 0) return false;
    if (m16) {
        launch_tiles<Act, TileM16>(p, m0, x_rows, t, stream);
    } else {
        launch_tiles<Act, TileM64>(p, m0, x_rows, t, stream);
    }
    return true;
}

template <typename Act>
void on_tensor_cores(const SkinnyLinearParams& p, cudaStream_t stream) {
    for (int64_t m0 = 0; m0 < p.rows;) {
        int x_rows = static_cast<int>(std::min<int64_t>(p.rows - m0, kMaxRows));
        while (!start<Act>(p, m0, x_rows, stream)) x_rows /= 2;
        m0 += x_rows;
    }
}

constexpr int kThreads = 128, kRows = kThreads / kWarp;  // rows of W in a block
constexpr int kSums = 8;  // of a lane: short sums are accurate, and do not wait for another

// Lane l takes features 4l … 4l+3 of every 128, and has a sum for each of eight features of two such groups. Its sums,
// then the lanes are added in a tree.
template <typename Act, typename Weight, int M>
__global__ void __launch_bounds__(kThreads, 3) multiply(SkinnyLinearParams p, int64_t m0) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (n >= p.out_features) return;  // a whole warp
    wait_for_previous();
    const Weight* weight = static_cast<const Weight*>(p.weight) + n * p.weight_row_stride;
    const Act* x = reinterpret_cast<const Act*>(p.x) + m0 * p.x_row_stride;
    float sums[M][kSums] = {};
    for (int64_t first = 4 * lane; first < p.in_features; first += kSums * kWarp) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t k = first + half * 4 * kWarp, left = p.in_features - k;
            const int count = left < 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
            const Float4 w = load4(weight + k, count, From::constants);
#pragma unroll
            for (int m = 0; m < M; m++) {
                const Float4 input = load4(x + m * p.x_row_stride + k, count);
#pragma unroll
                for (int i = 0; i < 4; i++) sums[m][4 * half + i] = fmaf(w.v[i], input.v[i], sums[m][4 * half + i]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int step = kSums / 2; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < step; i++) sums[m][i] += sums[m][i + step];
        }
        float total = warp_reduce_sum<kWarp>(sums[m][0]);
        total *= p.y_scale;
        if (p.bias) total += load(p.bias + n);
        if (lane == 0) store_as(p.y_dtype, p.y, (m0 + m) * p.out_features + n, total);
    }
}

template <typename Act, typename Weight, int M>
void tile(const SkinnyLinearParams& p, int64_t m0, cudaStream_t stream) {
    launch(multiply<Act, Weight, M>, dim3(blocks_for(p.out_features, kRows)), dim3(kThreads), stream, p, m0);
}

template <typename Act, typename Weight>
void by_multiply_adds(const SkinnyLinearParams& p, cudaStream_t stream) {
    int64_t m = 0;
    for (; m + 8 <= p.rows; m += 8) tile<Act, Weight, 8>(p, m, stream);
    if (p.rows - m >= 4) tile<Act, Weight, 4>(p, m, stream), m += 4;
    if (p.rows - m >= 2) tile<Act, Weight, 2>(p, m, stream), m += 2;
    if (p.rows - m >= 1) tile<Act, Weight, 1>(p, m, stream);
}

template <typename Act, typename Weight>
void run(const SkinnyLinearParams& p, cudaStream_t stream) {
    if constexpr (sizeof(Act) == 2 && std::is_same<Act, Weight>::value) {
        const int64_t stride = p.weight_row_stride * static_cast<int64_t>(sizeof(Act));
        const bool aligned = reinterpret_cast<uintptr_t>(p.weight) % kLaneBytes == 0 && stride % kLaneBytes == 0;
        const bool in_groups = p.in_features % (kLaneBytes / static_cast<int>(sizeof(Act))) == 0;
        if (aligned && in_groups) return on_tensor_cores<Act>(p, stream);
    }
    by_multiply_adds<Act, Weight>(p, stream);
}

template <typename Act>
void with_activations(const SkinnyLinearParams& p, cudaStream_t stream) {
    if (is_blocks(p.weight_dtype)) return multiply_blocks<Act>(p, stream);
    SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void skinny_linear(const SkinnyLinearParams& given, cudaStream_t stream) {
    SkinnyLinearParams p = given;
    if (p.out_features == 1 && !is_blocks(p.weight_dtype))
        p.weight_row_stride = 0;  // so that rows that do not exist have aligned addresses
    constexpr int64_t kMaxFeatures = INT32_MAX / 2 - 65536;
    if (p.in_features > kMaxFeatures || p.out_features > kMaxFeatures)
        throw std::invalid_argument("skinny_linear: too large for CUDA");
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
