// Sixteen rows of sixteen lanes become columns.
#pragma once

#include "simd.h"

namespace speculative_mamba::SM_ISA {

// out[j][i] = in[i][j], of 32 bits; `stride` is in bytes, from row to row.
inline void transpose(const void* in, int64_t stride, float* out) {
    const char* const rows = static_cast<const char*>(in);
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(rows + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // a[i + j]: four times column j of rows i … i+3, from every fourth column.
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int j = 0; j < 4; j++) {
        const __m512 even = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88),
                     odd = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
        const __m512 even_below = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
        const __m512 odd_below = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
        _mm512_storeu_ps(out + 16 * j, _mm512_shuffle_f32x4(even, even_below, 0x88));
        _mm512_storeu_ps(out + 16 * (j + 4), _mm512_shuffle_f32x4(odd, odd_below, 0x88));
        _mm512_storeu_ps(out + 16 * (j + 8), _mm512_shuffle_f32x4(even, even_below, 0xdd));
        _mm512_storeu_ps(out + 16 * (j + 12), _mm512_shuffle_f32x4(odd, odd_below, 0xdd));
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) std::memcpy(out + 16 * j + i, rows + i * stride + 4 * j, sizeof(float));
#endif
}

inline void transpose(const float* in, float* out) { transpose(in, 16 * sizeof(float), out); }

}  // namespace speculative_mamba::SM_ISA
