// Compares the instructions of AMX with their emulation, on random tiles of all shapes.
#include <sys/syscall.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

namespace speculative_mamba {
namespace hardware {
void product(int kind, uint8_t* c, const uint8_t* a, const uint8_t* b, uint8_t rows, uint8_t depth, uint8_t columns);
}
namespace emulated {
void product(int kind, uint8_t* c, const uint8_t* a, const uint8_t* b, uint8_t rows, uint8_t depth, uint8_t columns);
}
}  // namespace speculative_mamba

namespace {

constexpr int kKinds = 5, kRounds = 1000, kTile = 1024;
constexpr unsigned kModes[] = {0x1f80, 0x9fc0, 0x7f80};  // of MXCSR: as usual, without subnormals, towards zero
constexpr unsigned kFlags = 0x3f;                        // of exceptions that have occurred

enum Mood { ordinary, tiny, any, few_edges, edges };

std::mt19937 generator(1);

// The upper sixteen bits of a float. Products of tiny ones are subnormal, or nearly.
uint32_t half(int mood) {
    static const uint32_t kEdges[] = {0x0000, 0x8000, 0x0001, 0x807f, 0x0080, 0x8080, 0x7f7f, 0xff7f,
                                      0x7f80, 0xff80, 0x7fc0, 0xffc1, 0x7f81, 0xffa3, 0x3f80, 0xbf80};
    const uint32_t r = generator(), sign_and_mantissa = r & 0x807f, edge = kEdges[r % 16];
    switch (mood) {
        case ordinary: return sign_and_mantissa | (120 + (r >> 8 & 7)) << 7;
        case tiny: return sign_and_mantissa | (52 + (r >> 8 & 15)) << 7;
        case any: return r & 0xffff;
        case few_edges: return (r >> 8) % 64 ? sign_and_mantissa | (64 + (r >> 20 & 3)) << 7 : edge;
        default: return edge;
    }
}

void fill(uint8_t* tile, int lower, int upper) {
    for (int i = 0; i < kTile; i += 4) {
        const uint32_t bits = half(lower) | half(upper) << 16;
        std::memcpy(tile + i, &bits, sizeof bits);
    }
}

}  // namespace

int main() {
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return std::perror("permission"), 1;
    static uint8_t a[kTile], b[kTile], c[kTile], expected[kTile];
    for (int kind = 0; kind < kKinds; kind++)
        for (int round = 0; round < kRounds; round++) {
            const unsigned mode = kModes[round % 3];
            const int mood = kind == 0 ? round % 5 : any;
            _mm_setcsr(mode);
            fill(a, mood, mood);
            fill(b, mood, mood);
            fill(c, any, round % 2 ? mood : tiny);
            std::memcpy(expected, c, sizeof c);
            const auto size = [whole = round % 4 == 0] {
                return static_cast<uint8_t>(whole ? 16 : 1 + generator() % 16);
            };
            const uint8_t rows = size(), depth = size(), columns = size();
            speculative_mamba::hardware::product(kind, expected, a, b, rows, depth, columns);
            speculative_mamba::emulated::product(kind, c, a, b, rows, depth, columns);
            if ((_mm_getcsr() & ~kFlags) != mode) return std::puts("the float mode is another"), 1;
            for (int i = 0; i < kTile; i += 4) {
                uint32_t bits, emulated;
                std::memcpy(&bits, expected + i, 4);
                std::memcpy(&emulated, c + i, 4);
                if (bits == emulated) continue;
                std::printf("product %d, round %d, row %d, column %d: %08x, emulated %08x\n", kind, round, i / 64,
                            i % 64 / 4, bits, emulated);
                return 1;
            }
        }
    std::puts("equal");
}
