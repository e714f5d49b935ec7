// A product of tiles.h, of tiles in memory: compiled once with the instructions, once without.
#include "../../../csrc/cpu/tiles.h"

namespace speculative_mamba::SM_ISA {

// c, a, b of 1024 bytes each; `kind` 0 is bf16, then ssd, sud, usd, uud.
void product(int kind, uint8_t* c, const uint8_t* a, const uint8_t* b) {
    TileScope scope;
    tile_loadd<5>(c, kTileBytes);
    tile_loadd<0>(a, kTileBytes);
    tile_loadd<7>(b, kTileBytes);
    switch (kind) {
        case 0: tile_dpbf16ps<5, 0, 7>(); break;
        case 1: tile_dpbssd<5, 0, 7>(); break;
        case 2: tile_dpbsud<5, 0, 7>(); break;
        case 3: tile_dpbusd<5, 0, 7>(); break;
        case 4: tile_dpbuud<5, 0, 7>(); break;
    }
    tile_stored<5>(c, kTileBytes);
}

}  // namespace speculative_mamba::SM_ISA
