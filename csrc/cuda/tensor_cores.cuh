// Products on tensor cores, and the values of 16 bits that they take.
#pragma once

#include "device.cuh"

namespace speculative_mamba::cuda {

// Eight values of 16 bits, in pairs of which the first has the lower bits.
struct alignas(16) Packed8 {
    uint32_t pairs[4];
};

// c += a b: a (16, 16), b (16, 8), c (16, 8), spread over the lanes of a warp as PTX's mma.m16n8k16 says.
template <typename T>
__device__ __forceinline__ void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(SM_HOST_SHIM)
    shim::multiply_tiles(c, a, b, [](uint32_t bits) { return widen(T{static_cast<uint16_t>(bits)}); });
#else
#define SM_MMA(type)                                                           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if (std::is_same<T, bf16_t>::value) {
        SM_MMA("bf16");
    } else {
        SM_MMA("f16");
    }
#undef SM_MMA
#endif
}

}  // namespace speculative_mamba::cuda
