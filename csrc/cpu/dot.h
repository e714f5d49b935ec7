// Integer products of a few rows of W at a time, a lane a row, by what every instruction set does best. The sums are
// exact, so they are the same on all of them.
//
// Weights are unsigned bytes, four features of a row in each 32-bit lane. x has 24 bits: v = 2^16 a + 2^8 b + c with
// digits a, b, c from -128 to 127. Where bytes are multiplied, its parts are the three digits; elsewhere they are the
// words 2^8 a + b and c. Sums over 32 features do not overflow: 32 · 255 · 2^15 < 2^31.
//
// A Dot is a way to multiply: `start` and `add` sum up products of a part, of at most 32 features, to which `finished`
// gives `offset` more.
#pragma once

#include <type_traits>

#include "simd.h"

namespace speculative_mamba::SM_ISA {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD) || defined(SM_TILES)
#define SM_DIGITS  // bytes are multiplied
#endif

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
inline Floats load_rows(const float* p) { return _mm512_loadu_ps(p); }
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
inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints shifted(Ints a, Ints b) { return add(_mm512_slli_epi32(a, 8), b); }
inline Bytes less(Bytes a, char b) { return _mm512_sub_epi8(a, _mm512_set1_epi8(b)); }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int Shift>
inline Bytes bits(Bytes a, char mask) {
    return _mm512_and_si512(Shift ? _mm512_srli_epi16(a, Shift) : a, _mm512_set1_epi8(mask));
}
inline Bytes with_upper(Bytes a, Bytes upper) { return _mm512_or_si512(a, _mm512_slli_epi16(upper, 4)); }

#if defined(SM_DIGITS)
struct DigitDot {
    using part_t = int8_t;
    using Weights = Bytes;
    using Four = Ints;
    using Sum = Ints;
    static constexpr int kParts = 3;
    static constexpr bool kEvenFirst = false;
    static Weights prepared(Bytes a) { return a; }
    static Four load_four(const part_t* x) { return ints(four_bytes(x)); }
    static Sum start(int32_t offset) { return ints(offset); }
    static Sum add(Sum sum, Weights w, Four x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Ints finished(Sum sum, int32_t) { return sum; }
};
#else
struct WordDot {
    using part_t = int16_t;
    struct Weights {
        __m512i even, odd;
    };
    using Four = Weights;
    using Sum = Ints;
    static constexpr int kParts = 2;
    static constexpr bool kEvenFirst = true;  // of four features, even ones lie side by side
    static Weights prepared(Bytes a) { return {_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srli_epi16(a, 8)}; }
    static Four load_four(const part_t* x) {
        return {_mm512_set1_epi32(four_bytes(x)), _mm512_set1_epi32(four_bytes(x + 2))};
    }
    static Sum start(int32_t offset) { return ints(offset); }
    static Sum add(Sum sum, Weights w, Four x) {
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.even, x.even));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.odd, x.odd));
        asm("" : "+v"(sum));  // additions in another order would hold too many products at once
        return sum;
    }
    static Ints finished(Sum sum, int32_t) { return sum; }
};

// Of weights up to 15, 16 products fit into 16 bits.
struct PairDot {
    using part_t = int8_t;
    using Weights = Bytes;
    using Four = Ints;
    using Sum = __m512i;
    static constexpr int kParts = 3;
    static constexpr bool kEvenFirst = false;
    static Weights prepared(Bytes a) { return a; }
    static Four load_four(const part_t* x) { return ints(four_bytes(x)); }
    static Sum start(int32_t) { return _mm512_setzero_si512(); }
    static Sum add(Sum sum, Weights w, Four x) {
        sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x));
        asm("" : "+v"(sum));  // as above
        return sum;
    }
    static Ints finished(Sum sum, int32_t offset) {
        return _mm512_add_epi32(_mm512_madd_epi16(sum, _mm512_set1_epi16(1)), ints(offset));
    }
};
#endif

#elif defined(__AVX2__)

constexpr int kRows = 8;
using Floats = __m256;
using Ints = __m256i;
using Bytes = __m256i;
inline Floats floats(float a) { return _mm256_set1_ps(a); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats load_rows(const float* p) { return _mm256_loadu_ps(p); }
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
inline Ints load_ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints shifted(Ints a, Ints b) { return add(_mm256_slli_epi32(a, 8), b); }
inline Bytes less(Bytes a, char b) { return _mm256_sub_epi8(a, _mm256_set1_epi8(b)); }
inline void store_bytes(uint8_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <int Shift>
inline Bytes bits(Bytes a, char mask) {
    return _mm256_and_si256(Shift ? _mm256_srli_epi16(a, Shift) : a, _mm256_set1_epi8(mask));
}
inline Bytes with_upper(Bytes a, Bytes upper) { return _mm256_or_si256(a, _mm256_slli_epi16(upper, 4)); }

#if defined(SM_DIGITS)
struct DigitDot {
    using part_t = int8_t;
    using Weights = Bytes;
    using Four = Ints;
    using Sum = Ints;
    static constexpr int kParts = 3;
    static constexpr bool kEvenFirst = false;
    static Weights prepared(Bytes a) { return a; }
    static Four load_four(const part_t* x) { return ints(four_bytes(x)); }
    static Sum start(int32_t offset) { return ints(offset); }
#if defined(__AVXVNNI__)
    static Sum add(Sum sum, Weights w, Four x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
    static Sum add(Sum sum, Weights w, Four x) {  // the same in more instructions
        const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_srai_epi16(x, 8)));
    }
#endif
    static Ints finished(Sum sum, int32_t) { return sum; }
};
#else
struct WordDot {
    using part_t = int16_t;
    struct Weights {
        __m256i even, odd;
    };
    using Four = Weights;
    using Sum = Ints;
    static constexpr int kParts = 2;
    static constexpr bool kEvenFirst = true;  // of four features, even ones lie side by side
    static Weights prepared(Bytes a) { return {_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srli_epi16(a, 8)}; }
    static Four load_four(const part_t* x) {
        return {_mm256_set1_epi32(four_bytes(x)), _mm256_set1_epi32(four_bytes(x + 2))};
    }
    static Sum start(int32_t offset) { return ints(offset); }
    static Sum add(Sum sum, Weights w, Four x) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, x.even));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, x.odd));
        asm("" : "+x"(sum));  // additions in another order would hold too many products at once
        return sum;
    }
    static Ints finished(Sum sum, int32_t) { return sum; }
};

// Of weights up to 15, 16 products fit into 16 bits.
struct PairDot {
    using part_t = int8_t;
    using Weights = Bytes;
    using Four = Ints;
    using Sum = __m256i;
    static constexpr int kParts = 3;
    static constexpr bool kEvenFirst = false;
    static Weights prepared(Bytes a) { return a; }
    static Four load_four(const part_t* x) { return ints(four_bytes(x)); }
    static Sum start(int32_t) { return _mm256_setzero_si256(); }
    static Sum add(Sum sum, Weights w, Four x) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
        asm("" : "+x"(sum));  // as above
        return sum;
    }
    static Ints finished(Sum sum, int32_t offset) {
        return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), ints(offset));
    }
};
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
inline Floats load_rows(const float* p) {
    Floats a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store_rows(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
inline float widen(uint8_t a) { return a; }
inline float widen(int8_t a) { return a; }
template <typename T>
inline Floats load_lanes(const uint8_t* p) {
    T rows[kRows];
    std::memcpy(rows, p, sizeof rows);
    return Quad{widen(rows[0]), widen(rows[1]), widen(rows[2]), widen(rows[3])};
}
inline Floats load_halves(const uint8_t* p) { return load_lanes<f16_t>(p); }
inline Floats load_unsigned(const uint8_t* p) { return load_lanes<uint8_t>(p); }
inline Floats load_signed(const uint8_t* p) { return load_lanes<int8_t>(p); }
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

#if defined(SM_DIGITS)
struct DigitDot {
    using part_t = int8_t;
    using Weights = Bytes;
    using Four = Ints;
    using Sum = Ints;
    static constexpr int kParts = 3;
    static constexpr bool kEvenFirst = false;
    static Weights prepared(Bytes a) { return a; }
    static Four load_four(const part_t* x) { return ints(four_bytes(x)); }
    static Sum start(int32_t offset) { return ints(offset); }
    static Sum add(Sum sum, Weights w, Four x) { return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x); }
    static Ints finished(Sum sum, int32_t) { return sum; }
};
#else
struct WordDot {
    using part_t = int16_t;
    using Weights = Bytes;
    using Four = const part_t*;
    using Sum = Ints;
    static constexpr int kParts = 2;
    static constexpr bool kEvenFirst = false;
    static Weights prepared(Bytes a) { return a; }
    static Four load_four(const part_t* x) { return x; }
    static Sum start(int32_t offset) { return ints(offset); }
    static Sum add(Sum sum, Weights w, Four x) {
        for (int i = 0; i < 4; i++) sum += (QuadInt)((QuadUnsigned)w >> 8 * i & 255u) * static_cast<int32_t>(x[i]);
        return sum;
    }
    static Ints finished(Sum sum, int32_t) { return sum; }
};
#endif

#endif

// For weights up to kLargest.
#if defined(SM_DIGITS)
template <int kLargest>
using DotOf = DigitDot;
#elif defined(__AVX2__)
template <int kLargest>
using DotOf = std::conditional_t<kLargest <= 15, PairDot, WordDot>;
#else
template <int kLargest>
using DotOf = WordDot;
#endif

// Of the weights of Q8_0, which lie as 128 more than they are: what the instructions take, and what that is more.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kExcess = 0;
inline Bytes with_excess(Bytes a) { return a ^ static_cast<uint8_t>(128); }
#else
constexpr int kExcess = 128;
inline Bytes with_excess(Bytes a) { return a; }
#endif

}  // namespace speculative_mamba::SM_ISA
