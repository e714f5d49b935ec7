// Integer products of a few rows of W at a time, a lane a row, by what every instruction set does best. The sums are
// exact, so they are the same on all of them.
//
// Weights are unsigned bytes, four features of a row in each 32-bit lane. x has 24 bits: v = 2^16 a + 2^8 b + c with
// digits a, b, c from -128 to 127. Where bytes are multiplied, its parts are the three digits; elsewhere they are the
// words 2^8 a + b and c. Sums over 32 features do not overflow: 32 · 255 · 2^15 < 2^31.
#pragma once

#include <type_traits>

#include "simd.h"

namespace speculative_mamba::SM_ISA {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kMultipliesBytes = true;
#else
constexpr bool kMultipliesBytes = false;
#endif
using part_t = std::conditional_t<kMultipliesBytes, int8_t, int16_t>;
constexpr int kParts = kMultipliesBytes ? 3 : 2;  // the last is c
// Where the four features of a lane have their words: those that are multiplied together lie side by side.
constexpr int kPlaces[] = {0, kMultipliesBytes ? 1 : 2, kMultipliesBytes ? 2 : 1, 3};

inline int32_t four_bytes(const void* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}

#if defined(__AVX512F__)

constexpr int kRows = 16;
using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;
inline Floats floats(float a) { return _mm512_set1_ps(a); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline void store_rows(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline Floats load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_unsigned(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load_signed(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Ints ints(int32_t a) { return _mm512_set1_epi32(a); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints shifted(Ints a, Ints b) { return _mm512_add_epi32(_mm512_slli_epi32(a, 8), b); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int Shift>
inline Bytes bits(Bytes a, char mask) {
    return _mm512_and_si512(Shift ? _mm512_srli_epi16(a, Shift) : a, _mm512_set1_epi8(mask));
}
inline Bytes with_upper(Bytes a, Bytes upper) { return _mm512_or_si512(a, _mm512_slli_epi16(upper, 4)); }

#if defined(__AVX512VNNI__)
using Weights = Bytes;
using Four = Ints;
inline Weights prepared(Bytes a) { return a; }
inline Four load_four(const part_t* x) { return _mm512_set1_epi32(four_bytes(x)); }
inline Ints dot(Ints sum, Weights w, Four x) { return _mm512_dpbusd_epi32(sum, w, x); }
#else
struct Weights {
    __m512i even, odd;
};
using Four = Weights;
inline Weights prepared(Bytes a) { return {_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srli_epi16(a, 8)}; }
inline Four load_four(const part_t* x) {
    return {_mm512_set1_epi32(four_bytes(x)), _mm512_set1_epi32(four_bytes(x + 2))};
}
inline Ints dot(Ints sum, Weights w, Four x) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.even, x.even));
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.odd, x.odd));
    asm("" : "+v"(sum));  // additions in another order would hold too many products at once
    return sum;
}
#endif

#elif defined(__AVX2__)

constexpr int kRows = 8;
using Floats = __m256;
using Ints = __m256i;
using Bytes = __m256i;
inline Floats floats(float a) { return _mm256_set1_ps(a); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline void store_rows(float* p, Floats a) { _mm256_storeu_ps(p, a); }
inline Floats load_halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load_unsigned(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load_signed(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Ints ints(int32_t a) { return _mm256_set1_epi32(a); }
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints shifted(Ints a, Ints b) { return _mm256_add_epi32(_mm256_slli_epi32(a, 8), b); }
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <int Shift>
inline Bytes bits(Bytes a, char mask) {
    return _mm256_and_si256(Shift ? _mm256_srli_epi16(a, Shift) : a, _mm256_set1_epi8(mask));
}
inline Bytes with_upper(Bytes a, Bytes upper) { return _mm256_or_si256(a, _mm256_slli_epi16(upper, 4)); }

#if defined(__AVXVNNI__)
using Weights = Bytes;
using Four = Ints;
inline Weights prepared(Bytes a) { return a; }
inline Four load_four(const part_t* x) { return _mm256_set1_epi32(four_bytes(x)); }
inline Ints dot(Ints sum, Weights w, Four x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
struct Weights {
    __m256i even, odd;
};
using Four = Weights;
inline Weights prepared(Bytes a) { return {_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srli_epi16(a, 8)}; }
inline Four load_four(const part_t* x) {
    return {_mm256_set1_epi32(four_bytes(x)), _mm256_set1_epi32(four_bytes(x + 2))};
}
inline Ints dot(Ints sum, Weights w, Four x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, x.even));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, x.odd));
    asm("" : "+x"(sum));  // additions in another order would hold too many products at once
    return sum;
}
#endif

#else  // registers of four lanes

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint32_t QuadUnsigned __attribute__((vector_size(16)));

constexpr int kRows = 4;
using Floats = Quad;
using Ints = QuadInt;
inline Floats floats(float a) { return Quad{a, a, a, a}; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__aarch64__)
    return (Quad)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
inline void store_rows(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
inline float widen(uint8_t a) { return a; }
inline float widen(int8_t a) { return a; }
template <typename T>
inline Floats load_rows(const uint8_t* p) {
    T rows[kRows];
    std::memcpy(rows, p, sizeof rows);
    return Quad{widen(rows[0]), widen(rows[1]), widen(rows[2]), widen(rows[3])};
}
inline Floats load_halves(const uint8_t* p) { return load_rows<f16_t>(p); }
inline Floats load_unsigned(const uint8_t* p) { return load_rows<uint8_t>(p); }
inline Floats load_signed(const uint8_t* p) { return load_rows<int8_t>(p); }
inline Ints ints(int32_t a) { return QuadInt{a, a, a, a}; }
inline Floats to_floats(Ints a) { return __builtin_convertvector(a, Quad); }
inline Ints shifted(Ints a, Ints b) { return (a << 8) + b; }
inline Bytes load_bytes(const uint8_t* p) {
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return bytes;
}
template <int Shift>
inline Bytes bits(Bytes a, char mask) {
    return a >> Shift & static_cast<uint8_t>(mask);
}
inline Bytes with_upper(Bytes a, Bytes upper) { return a | upper << 4; }

using Weights = Bytes;
inline Weights prepared(Bytes a) { return a; }
#if defined(__ARM_FEATURE_DOTPROD)
using Four = Ints;
inline Four load_four(const part_t* x) { return ints(four_bytes(x)); }
inline Ints dot(Ints sum, Weights w, Four x) { return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x); }
#else
using Four = const part_t*;
inline Four load_four(const part_t* x) { return x; }
inline Ints dot(Ints sum, Weights w, Four x) {
    for (int i = 0; i < 4; i++) sum += (QuadInt)((QuadUnsigned)w >> 8 * i & 255u) * static_cast<int32_t>(x[kPlaces[i]]);
    return sum;
}
#endif

#endif

// Of the weights of Q8_0, which lie as 128 more than they are: what the instructions take, and what that is more.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kExcess = 0;
inline Bytes with_excess(Bytes a) { return a ^ static_cast<uint8_t>(128); }
#else
constexpr int kExcess = 128;
inline Bytes with_excess(Bytes a) { return a; }
#endif

// A sum of products from those with 2^8 a + b and with c: rounded to float where it has more than 24 bits.
inline Floats total(Ints high, Ints low) { return fma(to_floats(high), floats(256), to_floats(low)); }

}  // namespace speculative_mamba::SM_ISA
