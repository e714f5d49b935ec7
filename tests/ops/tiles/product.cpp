// A product of tiles.h, of tiles in memory: compiled once with the instructions, once without.
#include "../../../csrc/cpu/tiles.h"

namespace speculative_mamba::SM_ISA {

// c, a, b of 1024 bytes each, of which a product uses `rows` of c, as many of a, `depth` of b and `columns` of b and c;
// `kind` 0 is bf16, then ssd, sud, usd, uud.
void product(int kind, uint8_t* c, const uint8_t* a, const uint8_t* b, uint8_t rows, uint8_t depth, uint8_t columns) {
    const uint16_t row_bytes = 4 * columns, depth_bytes = 4 * depth;
    TileShapes shapes;
    shapes.of[5] = {rows, row_bytes};
    shapes.of[0] = {rows, depth_bytes};
    shapes.of[7] = {depth, row_bytes};
    TileScope scope(shapes);
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
