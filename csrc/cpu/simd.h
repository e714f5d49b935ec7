// Sixteen float lanes on every instruction set: the same operations in the same order, so that all sets with a fused
// multiply-add give the same bits. Included only by files compiled once per instruction set; everything lives in the
// namespace of that set, since code shared between them could pull a wide instruction into a narrow path.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace speculative_mamba::SM_ISA {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct Vec {
    __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const f16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max and min return `b` when either argument is NaN, so the value that may be NaN comes second.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^a for whole numbers a in [-126, 127].
inline Vec exp2_whole(Vec a) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline float sum(Vec a) {
    __m256 low = _mm512_castps512_ps256(a.v), high = _mm512_extractf32x8_ps(a.v, 1);
    __m256 half = _mm256_add_ps(low, high);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

#elif defined(__AVX2__)

struct Vec {
    __m256 lo, hi;
};
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const bf16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(q)), hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
inline Vec load(const f16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline bool any_greater(Vec a, Vec b) {
    __m256 lo = _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), hi = _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ);
    return _mm256_movemask_ps(_mm256_or_ps(lo, hi)) != 0;
}
inline Vec round(Vec a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 exp2_whole(__m256 a) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Vec exp2_whole(Vec a) { return {exp2_whole(a.lo), exp2_whole(a.hi)}; }
inline float sum(Vec a) {
    __m256 half = _mm256_add_ps(a.lo, a.hi);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

#else  // four registers of four lanes: NEON, or whatever the compiler makes of a vector type (SSE2 on x86-64)

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadInt __attribute__((vector_size(16)));

struct Vec {
    Quad q[4];
};

#define SM_LANEWISE(expression)                        \
    Vec out;                                           \
    for (int i = 0; i < 4; i++) out.q[i] = expression; \
    return out

inline Vec broadcast(float a) { SM_LANEWISE((Quad{a, a, a, a})); }
inline Vec zero() { return broadcast(0.f); }
inline Vec load(const float* p) {
    Vec out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline float widen(bf16_t a) {
    uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
inline float widen(f16_t a) {
#if defined(__aarch64__)
    __fp16 half;
    std::memcpy(&half, &a.bits, sizeof half);
    return half;
#else
    // Moves the exponent by multiplication, which also gets subnormals right; infinities and NaN are set apart.
    uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16, magnitude = static_cast<uint32_t>(a.bits & 0x7fffu)
                                                                               << 13;
    float out;
    std::memcpy(&out, &magnitude, sizeof out);
    out *= 0x1p112f;
    std::memcpy(&magnitude, &out, sizeof out);
    if ((a.bits & 0x7c00u) == 0x7c00u) magnitude |= 0x7f800000u;
    magnitude |= sign;
    std::memcpy(&out, &magnitude, sizeof out);
    return out;
#endif
}
template <typename T>
inline Vec load(const T* p) {
    float wide[kLanes];
    for (int i = 0; i < kLanes; i++) wide[i] = widen(p[i]);
    return load(wide);
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
inline Vec add(Vec a, Vec b) { SM_LANEWISE(a.q[i] + b.q[i]); }
inline Vec sub(Vec a, Vec b) { SM_LANEWISE(a.q[i] - b.q[i]); }
inline Vec mul(Vec a, Vec b) { SM_LANEWISE(a.q[i] * b.q[i]); }
inline Vec div(Vec a, Vec b) { SM_LANEWISE(a.q[i] / b.q[i]); }
#if defined(__aarch64__)
inline Vec fma(Vec a, Vec b, Vec c) {
    SM_LANEWISE((Quad)vfmaq_f32((float32x4_t)c.q[i], (float32x4_t)a.q[i], (float32x4_t)b.q[i]));
}
#else
inline Vec fma(Vec a, Vec b, Vec c) { SM_LANEWISE(a.q[i] * b.q[i] + c.q[i]); }
#endif
inline Quad select(QuadInt mask, Quad a, Quad b) { return (Quad)((mask & (QuadInt)a) | (~mask & (QuadInt)b)); }
inline Vec max(Vec a, Vec b) { SM_LANEWISE(select(a.q[i] > b.q[i], a.q[i], b.q[i])); }
inline Vec min(Vec a, Vec b) { SM_LANEWISE(select(a.q[i] < b.q[i], a.q[i], b.q[i])); }
inline bool any_greater(Vec a, Vec b) {
    QuadInt any = (a.q[0] > b.q[0]) | (a.q[1] > b.q[1]) | (a.q[2] > b.q[2]) | (a.q[3] > b.q[3]);
    return (any[0] | any[1] | any[2] | any[3]) != 0;
}
// Adding 1.5·2^23 leaves no bits for a fraction; right for |a| < 2^22.
inline Vec round(Vec a) {
    Vec magic = broadcast(0x1.8p23f);
    return sub(add(a, magic), magic);
}
inline Vec exp2_whole(Vec a) { SM_LANEWISE((Quad)((__builtin_convertvector(a.q[i], QuadInt) + 127) << 23)); }
inline float sum(Vec a) {
    Quad quarter = (a.q[0] + a.q[2]) + (a.q[1] + a.q[3]);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
#undef SM_LANEWISE

#endif

// The first `count` lanes; the others are 0 and are not read from memory.
template <typename T>
inline Vec load_partial(const T* p, int64_t count) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}
inline void store_partial(float* p, Vec a, int64_t count) {
    float lanes[kLanes];
    store(lanes, a);
    std::memcpy(p, lanes, count * sizeof(float));
}
template <typename T>
inline Vec load_n(const T* p, int64_t count) {
    return count == kLanes ? load(p) : load_partial(p, count);
}
inline void store_n(float* p, Vec a, int64_t count) { count == kLanes ? store(p, a) : store_partial(p, a, count); }
template <typename T>
inline Vec load_strided(const T* p, int64_t stride, int64_t count) {
    if (stride == 1 && count == kLanes) return load(p);
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i * stride];
    return load(lanes);
}

}  // namespace speculative_mamba::SM_ISA
