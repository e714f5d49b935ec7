// How a thread does arithmetic: rounding direction, and whether subnormal numbers count as zero. A job's threads must
// agree on it, or a result would depend on which of them computed it.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace speculative_mamba {

inline uint64_t float_mode() {
#if defined(__SSE__)
    return _mm_getcsr() & ~0x3fu;  // without the flags of exceptions that have occurred
#elif defined(__aarch64__)
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
#else
    return 0;
#endif
}

inline void set_float_mode(uint64_t mode) {
#if defined(__SSE__)
    _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
}

}  // namespace speculative_mamba
