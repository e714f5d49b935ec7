// What every CUDA kernel is written with: the only ways to touch memory, conversions, and math that is the same in all.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#if !defined(SM_HOST_SHIM)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../dtype.h"
#include "../params.h"

namespace speculative_mamba::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Memory that the threads of a block share.
#if defined(SM_HOST_SHIM)
#define SM_SHARED(type, name, count)                 \
    static ::shim::Shared<type, count> name##_array; \
    type* const name = name##_array.of_this_block()
#else
#define SM_SHARED(type, name, count) __shared__ type name[count]
#endif

struct alignas(16) Float4 {
    float v[4];
};

// bf16 and f16 as in dtype.h: bit patterns.
__device__ __forceinline__ float widen(float a) { return a; }
__device__ __forceinline__ float widen(int8_t a) { return a; }
__device__ __forceinline__ float widen(bf16_t a) {
    const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
template <typename T>
__device__ __forceinline__ T narrow(float a);
template <>
__device__ __forceinline__ float narrow<float>(float a) {
    return a;
}
// To nearest, ties to even; a NaN stays one.
template <>
__device__ __forceinline__ bf16_t narrow<bf16_t>(float a) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    bits = a != a ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    return {static_cast<uint16_t>(bits >> 16)};
}
#if defined(SM_HOST_SHIM)
inline float widen(f16_t a) {
    _Float16 half;
    std::memcpy(&half, &a.bits, sizeof half);
    return static_cast<float>(half);
}
template <>
inline f16_t narrow<f16_t>(float a) {
    const _Float16 half = static_cast<_Float16>(a);
    f16_t out;
    std::memcpy(&out.bits, &half, sizeof half);
    return out;
}
#else
__device__ __forceinline__ float widen(f16_t a) { return __half2float(__ushort_as_half(a.bits)); }
template <>
__device__ __forceinline__ f16_t narrow<f16_t>(float a) {
    return {__half_as_ushort(__float2half_rn(a))};
}
#endif

// The value that storing as T and loading again gives.
template <typename T>
__device__ __forceinline__ float rounded(float a) {
    return widen(narrow<T>(a));
}

// Memory is touched only by the next six, so that a build for the CPU can check every access.
template <typename T>
__device__ __forceinline__ T load_raw(const T* p) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().check(p, sizeof(T), shim::Kind::load);
#endif
    return *p;
}
template <typename T>
__device__ __forceinline__ void store_raw(T* p, T value) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().check(p, sizeof(T), shim::Kind::store);
#endif
    *p = value;
}
template <typename T>
__device__ __forceinline__ float load(const T* p) {
    return widen(load_raw(p));
}
template <typename T>
__device__ __forceinline__ void store(T* p, float value) {
    store_raw(p, narrow<T>(value));
}
// Adds to what lies there and gives what lay there before. Other threads may do the same at the same time.
__device__ __forceinline__ unsigned add_atomically(unsigned* p, unsigned value) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().check(p, sizeof *p, shim::Kind::atomic);
    return std::exchange(*p, *p + value);
#else
    return atomicAdd(p, value);
#endif
}
// Four values of which the first `count` exist; in one access where all do and the address allows it.
template <typename T>
__device__ __forceinline__ Float4 load4(const T* p, int count) {
    Float4 out;
#if !defined(SM_HOST_SHIM)
    struct alignas(4 * sizeof(T)) Four {
        T v[4];
    };
    if (count == 4 && reinterpret_cast<uintptr_t>(p) % sizeof(Four) == 0) {
        const Four four = *reinterpret_cast<const Four*>(p);
#pragma unroll
        for (int i = 0; i < 4; i++) out.v[i] = widen(four.v[i]);
        return out;
    }
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) out.v[i] = i < count ? load(p + i) : 0.f;
    return out;
}
template <typename T>
__device__ __forceinline__ void store4(T* p, const Float4& value, int count) {
#if !defined(SM_HOST_SHIM)
    struct alignas(4 * sizeof(T)) Four {
        T v[4];
    };
    if (count == 4 && reinterpret_cast<uintptr_t>(p) % sizeof(Four) == 0) {
        Four four;
#pragma unroll
        for (int i = 0; i < 4; i++) four.v[i] = narrow<T>(value.v[i]);
        *reinterpret_cast<Four*>(p) = four;
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < count) store(p + i, value.v[i]);
}

// log(1 + exp(x)), accurate for the smallest results too.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// Sum over `Lanes` neighbouring lanes, the same in each; a tree of fixed shape.
template <int Lanes>
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
    for (int mask = Lanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
    return value;
}

// The greatest that is not NaN.
template <int Lanes>
__device__ __forceinline__ float max_of_lanes(float value) {
#pragma unroll
    for (int mask = Lanes / 2; mask > 0; mask /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
    return value;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Starts a kernel. Through the runtime's function and not by launch syntax, which only nvcc knows.
template <typename... Parameters, typename... Arguments>
inline void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, cudaStream_t stream,
                   Arguments... arguments) {
#if defined(SM_HOST_SHIM)
    (void)stream;
    shim::Machine::get().launch(blocks, threads, [=] { kernel(arguments...); });
#else
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
#endif
}

}  // namespace speculative_mamba::cuda
