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
constexpr int kLineBytes = 64;  // of a cache

// Fetch a line that is soon read. The first-level cache waits for few lines at a time, and reads wait with it; the
// second-level one takes in more.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

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
// Adds just under half a unit of bf16, or just half where the kept bits are odd. That could carry a NaN into an
// infinity or a zero, so its quiet bit is set instead.
inline void store(bf16_t* p, Vec a) {
    __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    nearest = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16)));
}
inline void store(f16_t* p, Vec a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, mode));
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max and min return `b` when either argument is NaN, so the value that may be NaN comes second.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline bool any_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) != 0; }
// Lanes of `a` where `when` is zero, else of `b`.
inline Vec if_zero(Vec when, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(when.v, _mm512_setzero_ps(), _CMP_EQ_OQ), a.v)};
}
// The number whose biased exponent is the lowest eight bits of `a`, and the bit above them zero: a power of two.
inline Vec from_exponent(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))}; }
inline float sum(Vec a) {
    __m256 low = _mm512_castps512_ps256(a.v), high = _mm512_extractf32x8_ps(a.v, 1);
    __m256 half = _mm256_add_ps(low, high);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
// Lane i is the sum of v[i], added as by sum().
inline Vec add_lanes(const Vec (&v)[kLanes]) {
    __m512 halves[8], quarters[4], pairs[2];
    for (int i = 0; i < 8; i++) {  // of vectors 0, 4, 8, 12, 1, 5, …
        const __m512 a = v[i % 2 * 8 + i / 2].v, b = v[i % 2 * 8 + 4 + i / 2].v;
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; i++) {
        const __m512 a = halves[2 * i], b = halves[2 * i + 1];
        quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; i++) {
        const __m512d a = _mm512_castps_pd(quarters[2 * i]), b = _mm512_castps_pd(quarters[2 * i + 1]);
        pairs[i] =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return {_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd))};
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
// As for AVX-512: half a unit is added, and a NaN is kept from carrying.
inline __m128i to_bf16(__m256 a) {
    __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    nearest = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(nearest), _mm256_extracti128_si256(nearest, 1));
}
inline void store(bf16_t* p, Vec a) {
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, to_bf16(a.lo)), _mm_storeu_si128(q + 1, to_bf16(a.hi));
}
inline void store(f16_t* p, Vec a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, mode)), _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, mode));
}
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
inline bool any_equal(Vec a, Vec b) {
    __m256 lo = _mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), hi = _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ);
    return _mm256_movemask_ps(_mm256_or_ps(lo, hi)) != 0;
}
inline __m256 if_zero(__m256 when, __m256 a, __m256 b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(when, _mm256_setzero_ps(), _CMP_EQ_OQ));
}
inline Vec if_zero(Vec when, Vec a, Vec b) { return {if_zero(when.lo, a.lo, b.lo), if_zero(when.hi, a.hi, b.hi)}; }
inline __m256 from_exponent(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
inline Vec from_exponent(Vec a) { return {from_exponent(a.lo), from_exponent(a.hi)}; }
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
inline void narrow(float a, bf16_t* p) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    bits = a != a ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);  // as for AVX-512
    p->bits = static_cast<uint16_t>(bits >> 16);
}
inline void narrow(float a, f16_t* p) {
#if defined(__aarch64__)
    __fp16 half = a;
    std::memcpy(&p->bits, &half, sizeof half);
#else
    uint32_t bits, half;
    std::memcpy(&bits, &a, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Subnormal: in 0.5 + a, the last bit of the sum has the weight of a half's last bit.
    float sum;
    std::memcpy(&sum, &magnitude, sizeof sum);
    sum += 0.5f;
    std::memcpy(&half, &sum, sizeof half);
    half -= 0x3f000000u;
    if (magnitude >= 0x38800000u) half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    if (magnitude >= 0x47800000u) half = 0x7c00u;  // infinity from 2^16 on; half a unit below, the line above carries
    if (magnitude > 0x7f800000u) half = 0x7e00u;   // NaN
    p->bits = static_cast<uint16_t>(sign | half);
#endif
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
template <typename T>
inline void store(T* p, Vec a) {
    float wide[kLanes];
    store(wide, a);
    for (int i = 0; i < kLanes; i++) narrow(wide[i], p + i);
}
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
inline Vec if_zero(Vec when, Vec a, Vec b) { SM_LANEWISE(select(when.q[i] == Quad{}, a.q[i], b.q[i])); }
inline bool any_greater(Vec a, Vec b) {
    QuadInt any = (a.q[0] > b.q[0]) | (a.q[1] > b.q[1]) | (a.q[2] > b.q[2]) | (a.q[3] > b.q[3]);
    return (any[0] | any[1] | any[2] | any[3]) != 0;
}
inline bool any_equal(Vec a, Vec b) {
    QuadInt any = (a.q[0] == b.q[0]) | (a.q[1] == b.q[1]) | (a.q[2] == b.q[2]) | (a.q[3] == b.q[3]);
    return (any[0] | any[1] | any[2] | any[3]) != 0;
}
inline Vec from_exponent(Vec a) { SM_LANEWISE((Quad)((QuadInt)a.q[i] << 23)); }
inline float sum(Vec a) {
    Quad quarter = (a.q[0] + a.q[2]) + (a.q[1] + a.q[3]);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
#undef SM_LANEWISE

#endif

#if !defined(__AVX512F__)
// Lane i is the sum of v[i].
inline Vec add_lanes(const Vec (&v)[kLanes]) {
    float sums[kLanes];
    for (int i = 0; i < kLanes; i++) sums[i] = sum(v[i]);
    return load(sums);
}
#endif

// As store(), of a whole line at a multiple of its size, but past the caches: the line is not read first, and what is
// in them stays. For what is not read soon, and by other threads only after lines_stored().
template <typename T>
inline void store_line(T* p, Vec a) {
    store(p, a);
}
#if defined(__AVX512F__)
inline void store_line(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
#elif defined(__AVX2__)
inline void store_line(float* p, Vec a) { _mm256_stream_ps(p, a.lo), _mm256_stream_ps(p + 8, a.hi); }
#endif
inline void lines_stored() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// The first `count` lanes; the others are 0 and are not read from memory.
template <typename T>
inline Vec load_partial(const T* p, int64_t count) {
#if defined(__AVX512F__)
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == sizeof(float)) return {_mm512_maskz_loadu_ps(mask, p)};
    if constexpr (sizeof(T) == sizeof(uint16_t)) {
        alignas(32) T lanes[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(mask, p));
        return load(lanes);
    }
#endif
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}
template <typename T>
inline void store_partial(T* p, Vec a, int64_t count) {
    T lanes[kLanes];
    store(lanes, a);
    std::memcpy(p, lanes, count * sizeof(T));
}
template <typename T>
inline Vec load_n(const T* p, int64_t count) {
    return count == kLanes ? load(p) : load_partial(p, count);
}
template <typename T>
inline void store_n(T* p, Vec a, int64_t count) {
    count == kLanes ? store(p, a) : store_partial(p, a, count);
}
// The first `count` lanes; the others are zero.
inline Vec first_lanes(Vec a, int64_t count) {
    float lanes[kLanes];
    store(lanes, a);
    return load_n(lanes, count);
}
// `rows` times `count` values.
inline void store_zeros(float* p, int64_t rows, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < rows; i++) store_n(p + i * stride, zero(), count);
}
// The values that storing as T and loading again would give: the nearest that T has, of two the even one.
template <typename T>
inline Vec rounded(Vec a) {
    T lanes[kLanes];
    store(lanes, a);
    return load(lanes);
}
template <>
inline Vec rounded<float>(Vec a) {
    return a;
}
template <typename T>
inline Vec load_strided(const T* p, int64_t stride, int64_t count) {
    if (stride == 1 && count == kLanes) return load(p);
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i * stride];
    return load(lanes);
}

}  // namespace speculative_mamba::SM_ISA
