// A row is converted lane by lane, exactly.
#include "../params.h"
#include "parallel_for.h"
#include "simd.h"

namespace speculative_mamba::SM_ISA {
namespace {

template <typename scalar_t>
void run(const EmbedTokensParams& p, int threads) {
    const int64_t rows = p.batch * p.window;
    parallel_for(rows, divide_up(rows, threads), rows * p.features, threads, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; m++) {
            const int64_t token = p.tokens[m / p.window * p.tokens_row_stride + m % p.window];
            const scalar_t* row = static_cast<const scalar_t*>(p.table) + token * p.table_row_stride;
            for (int64_t k = 0; k < p.features; k += kLanes) {
                const int64_t count = min(kLanes, p.features - k);
                store_n(p.y + m * p.features + k, load_n(row + k, count), count);
            }
        }
    });
}

}  // namespace

void embed_tokens(const EmbedTokensParams& p, int threads) {
    SM_DISPATCH_DTYPE(p.table_dtype, run<scalar_t>(p, threads));
}

}  // namespace speculative_mamba::SM_ISA
