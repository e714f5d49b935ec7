#include <cmath>

#include "../params.h"
#include "parallel_for.h"
#include "simd.h"

namespace speculative_mamba::SM_ISA {
namespace {

template <typename scalar_t>
void row(const RmsNormParams& p, int64_t m) {
    const float* x = p.x + m * p.x_row_stride;
    const float* residual = p.residual ? p.residual + m * p.features : nullptr;
    const scalar_t* weight = static_cast<const scalar_t*>(p.weight);
    float* residual_out = p.residual_out + m * p.features;
    float* y = p.y + m * p.features;

    Vec squares = zero();
    for (int64_t k = 0; k < p.features; k += kLanes) {
        const int64_t count = smaller(kLanes, p.features - k);
        Vec value = load_n(x + k, count);
        if (residual) value = add(value, load_n(residual + k, count));
        store_n(residual_out + k, value, count);
        squares = fma(value, value, squares);
    }
    const Vec scale = broadcast(1.f / std::sqrt(sum(squares) / static_cast<float>(p.features) + p.eps));
    for (int64_t k = 0; k < p.features; k += kLanes) {
        const int64_t count = smaller(kLanes, p.features - k);
        store_n(y + k, mul(mul(load_n(residual_out + k, count), scale), load_n(weight + k, count)), count);
    }
}

template <typename scalar_t>
void run(const RmsNormParams& p, int threads) {
    parallel_for(p.rows, divide_up(p.rows, 4 * threads), p.rows * p.features, threads,
                 [&](int64_t first, int64_t last) {
                     for (int64_t m = first; m < last; m++) row<scalar_t>(p, m);
                 });
}

}  // namespace

void rms_norm(const RmsNormParams& p, int threads) { SM_DISPATCH_DTYPE(p.weight_dtype, run<scalar_t>(p, threads)); }

}  // namespace speculative_mamba::SM_ISA
