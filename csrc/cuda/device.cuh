// What every CUDA kernel is written with: the only ways to touch memory, conversions, and math that is the same in all.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
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
#if defined(SM_HOST_SHIM)
template <>
inline bf16_t narrow<bf16_t>(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    bits = a != a ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    return {static_cast<uint16_t>(bits >> 16)};
}
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
// Conversions of pairs are those that a multiprocessor has many units for.
template <>
__device__ __forceinline__ bf16_t narrow<bf16_t>(float a) {
    return {__bfloat16_as_ushort(__floats2bfloat162_rn(a, 0.f).x)};
}
__device__ __forceinline__ float widen(f16_t a) { return __half2float(__ushort_as_half(a.bits)); }
template <>
__device__ __forceinline__ f16_t narrow<f16_t>(float a) {
    return {__half_as_ushort(__low2half(__floats2half2_rn(a, 0.f)))};
}
#endif

// Narrows to a dtype known at run time.
template <typename T>
__device__ __forceinline__ void store(T* p, float value);
__device__ __forceinline__ void store_as(DType dtype, void* base, int64_t at, float value) {
    if (dtype == DType::float32) return store(static_cast<float*>(base) + at, value);
    if (dtype == DType::bfloat16) return store(static_cast<bf16_t*>(base) + at, value);
    store(static_cast<f16_t*>(base) + at, value);
}

// The value that storing as T and loading again gives.
template <typename T>
__device__ __forceinline__ float rounded(float a) {
    return widen(narrow<T>(a));
}

// Memory is touched only here and by groups below, so that a build for the CPU can check every access.
// Constants are weights: where the caller says that no kernel before writes them, they are read before
// wait_for_previous().
enum class From { memory, constants };
#if defined(SM_HOST_SHIM)
inline shim::Kind kind_of(From from) { return from == From::memory ? shim::Kind::load : shim::Kind::load_constant; }
#endif
template <typename T>
__device__ __forceinline__ T load_raw(const T* p, From from = From::memory) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().check(p, sizeof(T), kind_of(from));
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
__device__ __forceinline__ float load(const T* p, From from = From::memory) {
    return widen(load_raw(p, from));
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
// N values side by side, in one access.
template <typename T, int N>
struct alignas(N * sizeof(T)) Group {
    T v[N];
};
template <int N, typename T>
__device__ __forceinline__ bool allows_group(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(Group<T, N>) == 0;
}
template <int N, typename T>
__device__ __forceinline__ Group<T, N> load_group(const T* p, From from = From::memory) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().check(p, sizeof(Group<T, N>), kind_of(from), sizeof(T));
#endif
    return *reinterpret_cast<const Group<T, N>*>(p);
}
template <int N, typename T>
__device__ __forceinline__ void store_group(T* p, const Group<T, N>& group) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().check(p, sizeof group, shim::Kind::store, sizeof(T));
#endif
    *reinterpret_cast<Group<T, N>*>(p) = group;
}

// Four values in as few registers as hold them, so that nothing waits for a load before its values are used.
template <typename T>
struct alignas(4 * sizeof(T)) Packed4 {
    uint32_t words[sizeof(T)];
};
template <typename T>
__device__ __forceinline__ Float4 widen(const Packed4<T>& packed) {
    T values[4];
    memcpy(values, &packed, sizeof values);
    Float4 out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.v[i] = widen(values[i]);
    return out;
}
template <typename T>
__device__ __forceinline__ Packed4<T> load_packed4(const T* p, From from = From::memory) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().check(p, sizeof(Packed4<T>), kind_of(from), sizeof(T));
#endif
    return *reinterpret_cast<const Packed4<T>*>(p);
}
template <typename T>
__device__ __forceinline__ void store4(T* p, const Float4& value) {
    Group<T, 4> group;
#pragma unroll
    for (int i = 0; i < 4; i++) group.v[i] = narrow<T>(value.v[i]);
    store_group<4>(p, group);
}

// Four values of which the first `count` exist, the rest 0; in one access where all do and the address allows it.
template <typename T>
__device__ __forceinline__ Float4 load4(const T* p, int count, From from = From::memory) {
    if (count == 4 && allows_group<4>(p)) return widen(load_packed4(p, from));
    Float4 out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.v[i] = i < count ? load(p + i, from) : 0.f;
    return out;
}
template <typename T>
__device__ __forceinline__ void store4(T* p, const Float4& value, int count) {
    if (count == 4 && allows_group<4>(p)) return store4(p, value);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < count) store(p + i, value.v[i]);
}

// Whether every fourth value from p on, in every row, is where four can be accessed at once; none are at null.
template <typename T, typename... Strides>
inline bool fours(const void* p, Strides... strides) {
    return !p || (reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0 && ((strides % 4 == 0) && ...));
}

// Kernels of a stream overlap where the card can do it: while one runs, those after it are loaded already. So each
// writes nothing before wait_for_previous(), which returns when all kernels before have ended, and reads weights at
// most, after wait_for_weights(). A kernel that reads them first begins with start_next(), so that those after it can
// do the same.
__device__ __forceinline__ void start_next() {
#if !defined(SM_HOST_SHIM) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
    start_next();
#if defined(SM_HOST_SHIM)
    shim::Machine::get().running->waited = true;
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The same for a kernel that brings much of its constants in before: those after it are loaded only now, so that not
// too many kernels share the multiprocessors.
__device__ __forceinline__ void wait_before_next() {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().running->waited = true;
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    start_next();
}

// Weights may be read from here on: before the kernels before have ended only if none of them writes any.
__device__ __forceinline__ void wait_for_weights(bool are_constant) {
    if (!are_constant) wait_before_next();
}

// log(1 + exp(x)), accurate for the smallest results too.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// x between `lo` and `hi`; a NaN stays one.
__device__ __forceinline__ float clamped(float x, float lo, float hi) {
#if defined(SM_HOST_SHIM)
    return x < lo ? lo : x > hi ? hi : x;
#else
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(lo));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(hi));
    return x;
#endif
}

// 2 to the power of x, to one unit in the last place, where ex2.approx can be off by more; exactly 1 at 0; 0 below
// -126.5, infinity from 127.5 on. A polynomial of least relative error on [-1/2, 1/2], times an integral power.
__device__ __forceinline__ float power_of_2(float x) {
    constexpr float kToInteger = 0x1.8p+23f;  // adding it rounds to an integer, in the lowest bits
    x = clamped(x, -127.f, 128.f);
    const float shifted = x + kToInteger, rest = x - (shifted - kToInteger);
    float sum = 0x1.41fbbcp-13f;
    sum = fmaf(sum, rest, 0x1.5f3e54p-10f);
    sum = fmaf(sum, rest, 0x1.3b2d4cp-7f);
    sum = fmaf(sum, rest, 0x1.c6aee8p-5f);
    sum = fmaf(sum, rest, 0x1.ebfbdcp-3f);
    sum = fmaf(sum, rest, 0x1.62e430p-1f);
    sum = fmaf(sum, rest, 1.f);
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;  // 2 to the integral power; 0 for -127, infinity for 128
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

// The value that another of `Lanes` neighbouring lanes has.
template <int Lanes>
__device__ __forceinline__ float warp_shuffle(float value, int lane) {
    return __shfl_sync(kAllLanes, value, lane, Lanes);
}

// Sum over `Lanes` neighbouring lanes, the same in each; a tree of fixed shape, which joins those of `First` lanes.
template <int Lanes, int First = Lanes>
__device__ __forceinline__ float warp_reduce_sum(float value) {
#pragma unroll
    for (int mask = First / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
#pragma unroll
    for (int mask = First; mask < Lanes; mask *= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
    return value;
}

// A lane's sum is that of value lane % Values, as warp_reduce_sum<Lanes, Values> gives it, for few shuffles.
template <int Half, int Values>
__device__ __forceinline__ void sum_halves(float (&values)[Values], int lane) {
    if constexpr (Half > 0) {
        const bool upper = lane & Half;
#pragma unroll
        for (int i = 0; i < Half; i++) {
            const float mine = upper ? values[i + Half] : values[i], other = upper ? values[i] : values[i + Half];
            values[i] = mine + __shfl_xor_sync(kAllLanes, other, Half);
        }
        sum_halves<Half / 2>(values, lane);
    }
}
template <int Lanes, int Values>
__device__ __forceinline__ float sums_of_lanes(float (&values)[Values], int lane) {
    static_assert(Values <= Lanes, "");
    sum_halves<Values / 2>(values, lane);
#pragma unroll
    for (int mask = Values; mask < Lanes; mask *= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], mask);
    return values[0];
}

// The maximum, NaN left out.
template <int Lanes>
__device__ __forceinline__ float warp_reduce_max(float value) {
#pragma unroll
    for (int mask = Lanes / 2; mask > 0; mask /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
    return value;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

#if !defined(SM_HOST_SHIM)
inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline int current_device() {
    int device = 0;
    check(cudaGetDevice(&device));
    return device;
}
inline int of_current_device(cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, current_device()));
    return value;
}
inline int multiprocessors() { return of_current_device(cudaDevAttrMultiProcessorCount); }
inline int64_t max_shared_memory() { return of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Prepares a kernel for the current device, once. Whether it can be loaded while the one before it ends: it waits for
// that one where it was compiled for 9.0 or later, but code of an earlier architecture, translated for this card, does
// not. A multiprocessor divides one memory between blocks and cache, and to divide it anew it must be idle, which
// kernels that overlap never leave it: so all of them ask for the same.
inline bool prepare(const void* kernel) {
    constexpr int kPercentForBlocks = 75, kFirstThatWaits = 90;
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, bool> overlaps;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::pair<const void*, int> key(kernel, current_device());
    const auto known = overlaps.find(key);
    if (known != overlaps.end()) return known->second;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kPercentForBlocks));
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel));
    return overlaps[key] = attributes.ptxVersion >= kFirstThatWaits;
}
#else
inline int multiprocessors() { return shim::kMultiprocessors; }
inline int64_t max_shared_memory() { return shim::shared_memory_limit(); }
#endif

// Starts a kernel, unless it has no blocks, with `bytes` of launched memory each, beside which a kernel has none if
// they are many. Through the runtime's function and not by launch syntax, which only nvcc knows.
template <typename... Parameters, typename... Arguments>
inline void launch_with_memory(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int64_t bytes,
                               cudaStream_t stream, Arguments... arguments) {
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
    if (blocks.y > 65535 || blocks.z > 65535)
        throw std::invalid_argument("a CUDA kernel takes at most 65535 rows, and as many tokens of each");
#if defined(SM_HOST_SHIM)
    (void)stream;
    shim::Machine::get().launch(blocks, threads, static_cast<size_t>(bytes), [=] { kernel(arguments...); });
#else
    const void* function = reinterpret_cast<const void*>(kernel);
    const bool overlaps = prepare(function);
    constexpr int64_t kUnasked = 48 * 1024;
    if (bytes > kUnasked) {
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(max_shared_memory())));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = overlaps ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
#endif
}
template <typename... Parameters, typename... Arguments>
inline void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, cudaStream_t stream,
                   Arguments... arguments) {
    launch_with_memory(kernel, blocks, threads, 0, stream, arguments...);
}

}  // namespace speculative_mamba::cuda
