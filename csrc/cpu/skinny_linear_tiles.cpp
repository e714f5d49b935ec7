// skinny_linear for weights in bfloat16, by tiles.
#include "linear_output.h"
#include "linear_tiles_many.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Up to so many rows of x, weights are used as they lie.
constexpr int64_t kFewRows = 2 * kGroupTokens;
// Values of x up to which every thread packs all of them: the other one's cache lines would take longer to come.
constexpr int64_t kPackedByEach = 4096;
// Of the weights that a thread takes at a time, if they are few rows of x.
constexpr int64_t kChunkBytes = 64 * 1024;

void multiply_few(const SkinnyLinearParams& p, const LinearOperands<bf16_t>& operands, int threads) {
    const auto multiply = [&](const TokenGroups& x, int64_t first, int64_t last) {
        TileScope scope;
        multiply_few_rows(operands, x, first, last, LinearOutput{p});
    };
    const int64_t row_bytes = p.in_features * static_cast<int64_t>(sizeof(bf16_t)) + 1;
    const int64_t rows = kChunkBytes / row_bytes > 2 * kPanelRows ? kChunkBytes / row_bytes : 2 * kPanelRows;
    const int64_t grain = divide_up(min(rows, divide_up(p.out_features, 2 * threads)), kPanelRows) * kPanelRows;
    const int64_t work = column_tiles(p.rows) * p.in_features * p.out_features;  // what one row costs, five cost
    if (p.rows * p.in_features > kPackedByEach) {
        const TokenGroups x(operands, p.rows, threads);
        return parallel_for(p.out_features, grain, work, threads,
                            [&](int64_t first, int64_t last) { multiply(x, first, last); });
    }
    const FirstInThread first_in_thread;
    parallel_for(p.out_features, grain, work, threads, [&](int64_t first, int64_t last) {
        multiply(TokenGroups(operands, p.rows, first_in_thread() ? 1 : 0), first, last);
    });
}

// Threads share the rows of W, or those of x where W is one block; then each group of x is used right where it was
// packed.
void multiply_many(const SkinnyLinearParams& p, const LinearOperands<bf16_t>& operands, int threads) {
    const int64_t work = p.rows * p.in_features * p.out_features, groups = divide_up(p.rows, kTileRows);
    const int64_t block = resident_rows(operands);
    if (p.out_features <= block && groups >= threads) {
        return parallel_for(groups, divide_up(groups, threads), work, threads, [&](int64_t first, int64_t last) {
            thread_local Buffer buffer;
            bf16_t* const tiles = buffer.reserve<bf16_t>(token_tiles_size(p.in_features));
            float least[kTileRows];
            const auto pack = [&](int64_t group) { return pack_group(operands, p.rows, group, tiles, least); };
            TileScope scope;
            multiply_many_rows(operands, pack, first, last, 0, p.out_features, LinearOutput{p});
        });
    }
    const int64_t panels = divide_up(p.out_features, kPanelRows);
    if (panels == 0) return;
    const PackedGroups x(operands, p.rows, threads);
    const int64_t chunks = min(panels, threads * divide_up(p.out_features, block * threads));
    const auto start = [&](int64_t chunk) { return min(p.out_features, panels * chunk / chunks * kPanelRows); };
    parallel_for(chunks, 1, work, threads, [&](int64_t first, int64_t last) {
        TileScope scope;
        multiply_many_rows(operands, x, 0, groups, start(first), start(last), LinearOutput{p});
    });
}

}  // namespace

void skinny_linear_tiles(const SkinnyLinearParams& p, int threads) {
    const LinearOperands<bf16_t> operands{p.x, p.x_row_stride, static_cast<const bf16_t*>(p.weight),
                                          p.weight_row_stride, p.in_features};
    if (p.rows <= kFewRows) multiply_few(p, operands, threads);
    else multiply_many(p, operands, threads);
}

}  // namespace speculative_mamba::SM_ISA
