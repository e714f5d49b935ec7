// The tiles of tiles.h in plain memory, for machines that have none. Included by tiles.h alone.
#pragma once

#include <immintrin.h>

#include <cstring>

namespace speculative_mamba::SM_ISA {

// Outside its shape a tile has zeros. What the instructions do not define ends the process, as they do.
struct EmulatedTiles {
    alignas(kTileBytes) uint8_t bytes[kTiles][kTileRows][kTileBytes];
    TileShapes shapes;
    bool configured = false;

    uint8_t (&operator[](int t)) [kTileRows][kTileBytes] {
        if (!configured) __builtin_trap();
        return bytes[t];
    } void check_product(int c, int a, int b) const {
        const TileShape &C = shapes.of[c], &A = shapes.of[a], &B = shapes.of[b];
        if (A.rows != C.rows || A.row_bytes != 4 * B.rows || B.row_bytes != C.row_bytes) __builtin_trap();
    }
};

inline EmulatedTiles& tiles() {
    thread_local EmulatedTiles tiles;
    return tiles;
}

class TileScope {
 public:
    explicit TileScope(const TileShapes& shapes = {}) {
        tiles().configured = true;
        tiles().shapes = shapes;
        std::memset(tiles().bytes, 0, sizeof tiles().bytes);
    }
    ~TileScope() { tiles().configured = false; }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

template <int T>
inline void tile_zero() {
    std::memset(tiles()[T], 0, kTileRows * kTileBytes);
}
template <int T>
inline void tile_loadd(const void* p, int64_t stride) {
    const TileShape& shape = tiles().shapes.of[T];
    for (int row = 0; row < shape.rows; row++)
        std::memcpy(tiles()[T][row], static_cast<const uint8_t*>(p) + row * stride, shape.row_bytes);
}
template <int T>
inline void tile_stored(void* p, int64_t stride) {
    const TileShape& shape = tiles().shapes.of[T];
    for (int row = 0; row < shape.rows; row++)
        std::memcpy(static_cast<uint8_t*>(p) + row * stride, tiles()[T][row], shape.row_bytes);
}

// Written in assembly, so that they stay where MXCSR is set, and of two NaN the same one goes on.
inline void multiply_add(__m256& c, __m256 a, __m256 b) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
}
inline void add_to(__m256& c, __m256 a) { asm volatile("vaddps %1, %0, %0" : "+x"(c) : "x"(a)); }

// Eight columns of a row of C. Of four bytes of B the lower half is a feature with an even number.
inline void dot_bf16(float* c, const uint8_t* a, const uint8_t (*b)[kTileBytes], int depth, int column) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps(), total = _mm256_loadu_ps(c + column);
    for (int k = 0; k < depth; k++) {
        int32_t pair;
        std::memcpy(&pair, a + 4 * k, sizeof pair);
        const __m256i left = _mm256_set1_epi32(pair);
        const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b[k] + 4 * column));
        multiply_add(even, _mm256_castsi256_ps(_mm256_slli_epi32(left, 16)),
                     _mm256_castsi256_ps(_mm256_slli_epi32(right, 16)));
        multiply_add(odd, _mm256_castsi256_ps(_mm256_and_si256(left, upper)),
                     _mm256_castsi256_ps(_mm256_and_si256(right, upper)));
    }
    add_to(even, odd);
    add_to(total, even);
    _mm256_storeu_ps(c + column, total);
}

template <int C, int A, int B>
inline void tile_dpbf16ps() {
    tiles().check_product(C, A, B);
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(0x9fc0);  // to nearest, subnormal operands and results are zeros, no exceptions
    const int depth = tiles().shapes.of[B].rows;
    for (int row = 0; row < tiles().shapes.of[C].rows; row++) {
        float c[kTileRows];
        std::memcpy(c, tiles()[C][row], sizeof c);
        for (int column = 0; column < kTileRows; column += 8) dot_bf16(c, tiles()[A][row], tiles()[B], depth, column);
        std::memcpy(tiles()[C][row], c, sizeof c);
    }
    _mm_setcsr(mode);
}

template <int C, int A, int B, typename Left, typename Right>
inline void dot_bytes() {
    tiles().check_product(C, A, B);
    for (int row = 0; row < kTileRows; row++) {
        uint32_t c[kTileRows];
        std::memcpy(c, tiles()[C][row], sizeof c);
        for (int i = 0; i < kTileBytes; i++) {
            const int left = static_cast<Left>(tiles()[A][row][i]);
            const uint8_t* const right = tiles()[B][i / 4] + i % 4;
            for (int n = 0; n < kTileRows; n++) c[n] += static_cast<uint32_t>(left * static_cast<Right>(right[4 * n]));
        }
        std::memcpy(tiles()[C][row], c, sizeof c);
    }
}
template <int C, int A, int B>
inline void tile_dpbssd() {
    dot_bytes<C, A, B, int8_t, int8_t>();
}
template <int C, int A, int B>
inline void tile_dpbsud() {
    dot_bytes<C, A, B, int8_t, uint8_t>();
}
template <int C, int A, int B>
inline void tile_dpbusd() {
    dot_bytes<C, A, B, uint8_t, int8_t>();
}
template <int C, int A, int B>
inline void tile_dpbuud() {
    dot_bytes<C, A, B, uint8_t, uint8_t>();
}

}  // namespace speculative_mamba::SM_ISA
