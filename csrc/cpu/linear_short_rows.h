// Rows of x times rows of W that have at most sixteen features. Lanes run over rows of W, sixteen of which become
// columns once for all rows of x; a product's features are added one after the other, whatever else is computed with
// it.
#pragma once

#include "linear_operands.h"
#include "parallel_for.h"
#include "transpose.h"

namespace speculative_mamba::SM_ISA {

// All rows of x times rows first … last-1 of W: calls store(m, n, sums, count) for `count` of W's rows from n on.
template <typename scalar_t, typename Store>
inline void multiply_short_rows(const LinearOperands<scalar_t>& p, int64_t rows, int64_t first, int64_t last,
                                const Store& store) {
    alignas(64) float weights[kLanes][kLanes] = {}, columns[kLanes][kLanes];
    for (int64_t n = first; n < last; n += kLanes) {
        const int64_t count = min(kLanes, last - n);
        for (int64_t i = 0; i < count && p.in_features > 0; i++) {  // without features there may be no memory
            const Vec row = load_n(p.weight + (n + i) * p.weight_row_stride, p.in_features);
            speculative_mamba::SM_ISA::store(weights[i], row);
        }
        transpose(weights[0], columns[0]);
        for (int64_t m = 0; m < rows; m++) {
            const float* x = p.x + m * p.x_row_stride;
            Vec sums = zero();
            for (int64_t k = 0; k < p.in_features; k++) sums = fma(broadcast(x[k]), load(columns[k]), sums);
            store(m, n, sums, count);
        }
    }
}

}  // namespace speculative_mamba::SM_ISA
