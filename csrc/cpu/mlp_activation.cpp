// Lanes run over features; every value goes through the same operations wherever it lies.
#include "../params.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {

void mlp_activation(const MlpActivationParams& p, int threads) {
    const int64_t blocks = divide_up(p.features, kLanes), items = p.rows * blocks;
    parallel_for(items, divide_up(items, 4 * threads), 16 * items * kLanes, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t m = i / blocks, k = i % blocks * kLanes, count = min(kLanes, p.features - k);
            const Vec gate = load_n(p.gate + m * p.gate_row_stride + k, count);
            Vec value;
            if (p.activation == kRelu2) {
                const Vec positive = max(zero(), gate);  // a NaN in second place stays one
                value = mul(positive, positive);
            } else {
                value = silu(gate);
            }
            if (p.up) value = mul(value, load_n(p.up + m * p.up_row_stride + k, count));
            store_n(p.y + m * p.features + k, value, count);
        }
    });
}

}  // namespace speculative_mamba::SM_ISA
