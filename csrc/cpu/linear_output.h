// How a linear layer stores several of its sums: y_scale and the bias come last.
#pragma once

#include "../params.h"
#include "simd.h"

namespace speculative_mamba::SM_ISA {

struct LinearOutput {
    const SkinnyLinearParams& p;

    void operator()(int64_t m, int64_t n, Vec y, int64_t count) const {
        if (p.y_scale != 1) y = mul(y, broadcast(p.y_scale));
        if (p.bias) y = add(y, load_n(p.bias + n, count));
        store_n(p.y + m * p.out_features + n, y, count);
    }
};

}  // namespace speculative_mamba::SM_ISA
