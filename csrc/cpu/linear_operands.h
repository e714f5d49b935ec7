// What a linear layer multiplies.
#pragma once

#include <cstdint>

namespace speculative_mamba::SM_ISA {

// Where x (rows, K) and W (N, K) lie; and what is read after the last of the rows of W, if not what lies behind them.
template <typename scalar_t>
struct LinearOperands {
    const float* x;
    int64_t x_row_stride;
    const scalar_t* weight;
    int64_t weight_row_stride;
    int64_t in_features;
    const scalar_t* after = nullptr;
};

}  // namespace speculative_mamba::SM_ISA
