// A block takes one group of one row. Which thread adds what, and in which order, depends on the group's size alone: a
// thread has four neighbouring values of every 4·kThreads.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kStep = 4 * kThreads;

// Where a block finds its group.
template <typename Act, typename Weight>
struct Pointers {
    const Act *x, *gate;    // gate may be null
    const float* residual;  // may be null
    float* residual_out;
    const Weight* weight;
    Act* y;

    __device__ __forceinline__ Pointers(const RmsNormParams& p, int size) {
        const int64_t row = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * size;
        x = reinterpret_cast<const Act*>(p.x) + row * p.x_row_stride + first;
        gate = p.gate ? reinterpret_cast<const Act*>(p.gate) + row * p.gate_row_stride + first : nullptr;
        residual = p.residual ? p.residual + row * p.features + first : nullptr;
        residual_out = p.residual_out + row * p.features + first;
        weight = static_cast<const Weight*>(p.weight) + first;
        y = reinterpret_cast<Act*>(p.y) + row * p.features + first;
    }
};

__device__ __forceinline__ int group_size(const RmsNormParams& p) {
    return static_cast<int>(p.features) / static_cast<int>(p.groups);
}
__device__ __forceinline__ void scale(Float4& value, float by) {
#pragma unroll
    for (int i = 0; i < 4; i++) value.v[i] *= by;
}
__device__ __forceinline__ void scale_and_add(Float4& value, float by, const Float4& residual) {
#pragma unroll
    for (int i = 0; i < 4; i++) value.v[i] = fmaf(value.v[i], by, residual.v[i]);
}
__device__ __forceinline__ void open(Float4& value, const Float4& gate) {
#pragma unroll
    for (int i = 0; i < 4; i++) value.v[i] *= silu(gate.v[i]);
}
__device__ __forceinline__ void add_squares(float& sum, const Float4& value) {
#pragma unroll
    for (int i = 0; i < 4; i++) sum = fmaf(value.v[i], value.v[i], sum);
}
__device__ __forceinline__ Float4 scaled(Float4 value, float scale, const Float4& weight) {
#pragma unroll
    for (int i = 0; i < 4; i++) value.v[i] = value.v[i] * scale * weight.v[i];
    return value;
}

// What a group is multiplied by, from its threads' sums of squares.
__device__ __forceinline__ float scale_of(float squares, int size, float eps, float* of_warp) {
    squares = warp_reduce_sum<kWarp>(squares);
    if (threadIdx.x % kWarp == 0) store(of_warp + threadIdx.x / kWarp, squares);
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) total += load(of_warp + w);
    return 1.f / sqrtf(total / static_cast<float>(size) + eps);
}

// Up to `Steps` · kStep values, all in registers and loaded at once, in whole fours.
template <typename Act, typename Weight, int Steps>
__global__ void __launch_bounds__(kThreads, 1) normalise_at_once(RmsNormParams p) {
    SM_SHARED(float, of_warp, kWarps);
    start_next();
    const int size = group_size(p), first = 4 * static_cast<int>(threadIdx.x);
    const Pointers<Act, Weight> at(p, size);
    auto exists = [&](int j) { return first + j * kStep < size; };
    wait_for_weights(p.constant_weights);
    Packed4<Weight> weights[Steps] = {};
#pragma unroll
    for (int j = 0; j < Steps; j++)
        if (exists(j)) weights[j] = load_packed4(at.weight + first + j * kStep, From::constants);
    wait_for_previous();
    Packed4<Act> inputs[Steps] = {}, gates[Steps] = {};
    Packed4<float> residuals[Steps] = {};
#pragma unroll
    for (int j = 0; j < Steps; j++) {
        if (!exists(j)) continue;
        inputs[j] = load_packed4(at.x + first + j * kStep);
        if (at.residual) residuals[j] = load_packed4(at.residual + first + j * kStep);
        if (at.gate) gates[j] = load_packed4(at.gate + first + j * kStep);
    }
    Float4 values[Steps];
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < Steps; j++) {
        values[j] = widen(inputs[j]);
        if (at.residual) {
            scale_and_add(values[j], p.x_scale, widen(residuals[j]));
        } else {
            scale(values[j], p.x_scale);
        }
        if (at.gate) open(values[j], widen(gates[j]));
        add_squares(squares, values[j]);
    }
    const float scale = scale_of(squares, size, p.eps, of_warp);
#pragma unroll
    for (int j = 0; j < Steps; j++) {
        if (!exists(j)) continue;
        store4(at.residual_out + first + j * kStep, values[j]);
        store4(at.y + first + j * kStep, scaled(values[j], scale, widen(weights[j])));
    }
}

// Any number of values, at any address.
template <typename Act, typename Weight>
__global__ void __launch_bounds__(kThreads) normalise(RmsNormParams p) {
    SM_SHARED(float, of_warp, kWarps);
    wait_for_previous();
    const int size = group_size(p), first = 4 * static_cast<int>(threadIdx.x);
    const Pointers<Act, Weight> at(p, size);
    auto count = [&](int k) { return size - k < 4 ? size - k : 4; };
    float squares = 0.f;
    for (int k = first; k < size; k += kStep) {
        Float4 value = load4(at.x + k, count(k));
        if (at.residual) {
            scale_and_add(value, p.x_scale, load4(at.residual + k, count(k)));
        } else {
            scale(value, p.x_scale);
        }
        if (at.gate) open(value, load4(at.gate + k, count(k)));
        store4(at.residual_out + k, value, count(k));
        add_squares(squares, value);
    }
    const float scale = scale_of(squares, size, p.eps, of_warp);
    for (int k = first; k < size; k += kStep) {  // each thread reads back what it wrote
        const Float4 value = load4(static_cast<const float*>(at.residual_out + k), count(k));
        store4(at.y + k, scaled(value, scale, load4(at.weight + k, count(k))), count(k));
    }
}

template <typename Act, typename Weight>
void run(const RmsNormParams& p, cudaStream_t stream) {
    if (p.rows == 0) return;
    const dim3 blocks(static_cast<unsigned>(p.groups), static_cast<unsigned>(p.rows));
    const int64_t size = p.features / p.groups;
    const bool in_fours = size % 4 == 0 && fours<Act>(p.x, p.x_row_stride) && fours<Act>(p.gate, p.gate_row_stride) &&
                          fours<float>(p.residual) && fours<float>(p.residual_out) && fours<Weight>(p.weight) &&
                          fours<Act>(p.y);
    auto kernel = !in_fours           ? normalise<Act, Weight>
                  : size <= kStep     ? normalise_at_once<Act, Weight, 1>
                  : size <= 3 * kStep ? normalise_at_once<Act, Weight, 3>
                  : size <= 5 * kStep ? normalise_at_once<Act, Weight, 5>
                  : size <= 8 * kStep ? normalise_at_once<Act, Weight, 8>
                                      : normalise<Act, Weight>;
    launch(kernel, blocks, dim3(kThreads), stream, p);
}

template <typename Act>
void with_activations(const RmsNormParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.weight_dtype, run<Act, scalar_t>(p, stream));
}

}  // namespace

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
    SM_DISPATCH_DTYPE(p.activations, with_activations<scalar_t>(p, stream));
}

}  // namespace speculative_mamba::cuda
