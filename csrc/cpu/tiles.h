// Intel's AMX: each thread has eight tiles of sixteen rows of 64 bytes; products of two tiles are added to a third.
// Where the compiler has the instructions (-mamx-tile -mamx-bf16 -mamx-int8) functions are one instruction; elsewhere
// tiles_emulated.h gives the same bits with AVX2. Functions are named after the instructions. Tiles are template
// arguments, because the instructions encode them.
//
// Products: C is up to 16 × 16; A has one row for each row of C; B has four bytes in each of its rows for each column
// of C. Row k of B is multiplied with bytes 4k … 4k+3 of each row of A.
//
//   tile_dpbf16ps: c + (Σ a[2k] b[2k] + Σ a[2k+1] b[2k+1]). Each sum is fused multiply-adds, one for each row of B, in
//   the order of k, that begin with +0; then two additions. All are of float32 and round to nearest, ties to even.
//   Subnormal operands and subnormal results count as zeros of their sign. MXCSR is neither read nor written.
//
//   tile_dpbssd, …: c + Σ a b, of int32, which wraps around. The two letters before the d tell whether the bytes of A
//   and those of B are signed (s) or unsigned (u).
//
// Tiles may be used while a TileScope lives in the same thread, and only if dispatch.cpp has found AMX permitted.
#pragma once

#include <cstdint>

namespace speculative_mamba::SM_ISA {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

// A product costs as much time as C has rows. A has four bytes in a row for each row of B.
struct TileShape {
    uint8_t rows = kTileRows;
    uint16_t row_bytes = kTileBytes;
};
struct TileShapes {
    TileShape of[kTiles];
};

}  // namespace speculative_mamba::SM_ISA

#if !defined(__AMX_TILE__)

#include "tiles_emulated.h"

#else

namespace speculative_mamba::SM_ISA {

// Configures all tiles for the thread, as zeros; releases them at the end. Not to be nested.
class TileScope {
 public:
    explicit TileScope(const TileShapes& shapes = {}) {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config = {};
        config.palette = 1;
        for (int t = 0; t < kTiles; t++) {
            config.row_bytes[t] = shapes.of[t].row_bytes;
            config.rows[t] = shapes.of[t].rows;
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~TileScope() { asm volatile("tilerelease"); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

template <int T>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

// `stride` is in bytes, from row to row.
template <int T>
inline void tile_loadd(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_stored(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}

#define SM_TILE_PRODUCT(instruction)                                                               \
    template <int C, int A, int B>                                                                 \
    inline void tile_##instruction() {                                                             \
        asm volatile("t" #instruction " %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); \
    }
SM_TILE_PRODUCT(dpbf16ps)
SM_TILE_PRODUCT(dpbssd)
SM_TILE_PRODUCT(dpbsud)
SM_TILE_PRODUCT(dpbusd)
SM_TILE_PRODUCT(dpbuud)
#undef SM_TILE_PRODUCT

}  // namespace speculative_mamba::SM_ISA

#endif
