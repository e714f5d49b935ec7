// skinny_linear for weights in bfloat16, by tiles; y_scale and the bias come last.
#include "../params.h"
#include "linear_tiles.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Values of x up to which every thread packs all of them: the other one's cache lines would take longer to come.
constexpr int64_t kPackedByEach = 4096;

struct Output {
    const SkinnyLinearParams& p;

    void operator()(int64_t m, int64_t n, const float* sums, int count) const {
        Vec y = load(sums);
        if (p.y_scale != 1) y = mul(y, broadcast(p.y_scale));
        if (p.bias) y = add(y, load_n(p.bias + n, count));
        store_n(p.y + m * p.out_features + n, y, count);
    }
};

}  // namespace

void skinny_linear_tiles(const SkinnyLinearParams& p, int threads) {
    const LinearOperands<bf16_t> operands{p.x, p.x_row_stride, static_cast<const bf16_t*>(p.weight),
                                          p.weight_row_stride, p.in_features};
    const auto multiply = [&](const TokenGroups& x, int64_t first, int64_t last) {
        TileScope scope;
        multiply_rows_by_tiles(operands, x, first, last, Output{p});
    };
    const int64_t grain = rows_of_chunk(operands, p.rows, p.out_features, threads);
    const int64_t work = p.rows * p.in_features * p.out_features;
    if (p.rows * p.in_features <= kPackedByEach) {
        static uint64_t calls = 0;
        const uint64_t call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
        return parallel_for(p.out_features, grain, work, threads, [&](int64_t first, int64_t last) {
            thread_local uint64_t packed = 0;  // in which call
            multiply(TokenGroups(operands, p.rows, packed == call ? 0 : 1), first, last);
            packed = call;
        });
    }
    const TokenGroups x(operands, p.rows, threads);
    parallel_for(p.out_features, grain, work, threads, [&](int64_t first, int64_t last) { multiply(x, first, last); });
}

}  // namespace speculative_mamba::SM_ISA
