#include <cmath>

#include "../params.h"
#include "parallel_for.h"
#include "simd_math.h"

namespace speculative_mamba::SM_ISA {
namespace {

// One group of one row: `size` features from `first` on.
template <typename scalar_t>
void group(const RmsNormParams& p, int64_t m, int64_t first, int64_t size) {
    const float* x = p.x + m * p.x_row_stride + first;
    const float* residual = p.residual ? p.residual + m * p.features + first : nullptr;
    const float* gate = p.gate ? p.gate + m * p.gate_row_stride + first : nullptr;
    const scalar_t* weight = static_cast<const scalar_t*>(p.weight) + first;
    float* residual_out = p.residual_out + m * p.features + first;
    float* y = p.y + m * p.features + first;

    const Vec x_scale = broadcast(p.x_scale);
    Vec squares = zero();
    for (int64_t k = 0; k < size; k += kLanes) {
        const int64_t count = min(kLanes, size - k);
        const Vec input = load_n(x + k, count);
        Vec value = residual ? fma(input, x_scale, load_n(residual + k, count)) : mul(input, x_scale);
        if (gate) value = mul(value, silu(load_n(gate + k, count)));
        store_n(residual_out + k, value, count);
        squares = fma(value, value, squares);
    }
    const Vec scale = broadcast(1.f / std::sqrt(sum(squares) / static_cast<float>(size) + p.eps));
    for (int64_t k = 0; k < size; k += kLanes) {
        const int64_t count = min(kLanes, size - k);
        store_n(y + k, mul(mul(load_n(residual_out + k, count), scale), load_n(weight + k, count)), count);
    }
}

template <typename scalar_t>
void run(const RmsNormParams& p, int threads) {
    const int64_t items = p.rows * p.groups, size = p.features / p.groups;
    const int64_t work = p.rows * p.features * (p.gate ? 16 : 1);
    parallel_for(items, divide_up(items, 4 * threads), work, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) group<scalar_t>(p, i / p.groups, i % p.groups * size, size);
    });
}

}  // namespace

void rms_norm(const RmsNormParams& p, int threads) { SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t>(p, threads)); }

}  // namespace speculative_mamba::SM_ISA
