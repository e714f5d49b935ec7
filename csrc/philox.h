// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers as a function of a
// counter and a key, the same on every machine. Nothing here has external linkage, so every instruction set keeps its
// own copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SM_EVERYWHERE __host__ __device__
#else
#define SM_EVERYWHERE
#endif

namespace speculative_mamba {
namespace {

// Replaces L counters, of four words each, by their random words.
template <int L>
SM_EVERYWHERE inline void philox(uint32_t (&words)[4][L], uint64_t key) {
    constexpr uint32_t a = 0xD2511F53, b = 0xCD9E8D57;
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; round++) {
        for (int l = 0; l < L; l++) {
            const uint32_t high_a = (uint64_t{a} * words[0][l]) >> 32, low_a = a * words[0][l];
            const uint32_t high_b = (uint64_t{b} * words[2][l]) >> 32, low_b = b * words[2][l];
            words[0][l] = high_b ^ words[1][l] ^ low;
            words[2][l] = high_a ^ words[3][l] ^ high;
            words[1][l] = low_b;
            words[3][l] = low_a;
        }
        low += 0x9E3779B9, high += 0xBB67AE85;
    }
}

// What a random number is for: numbers of different purposes at one position of the text are independent.
enum class Purpose : uint32_t { token = 0, draft = 1, test = 2 };

// The random numbers of one position of one text.
struct Noise {
    uint64_t seed;
    uint32_t stream, position;
    Purpose purpose;

    template <int L>
    SM_EVERYWHERE void fill(uint32_t (&words)[4][L], uint32_t first) const {
        for (int l = 0; l < L; l++) {
            words[0][l] = first + l, words[1][l] = position;
            words[2][l] = stream, words[3][l] = static_cast<uint32_t>(purpose);
        }
        philox<L>(words, seed);
    }

    // Token t's 32 bits. Sixteen counters serve sixty-four tokens, so that neighbours lie in neighbouring lanes.
    SM_EVERYWHERE uint32_t bits(uint32_t token) const {
        uint32_t words[4][1];
        fill<1>(words, token / 64 * 16 + token % 16);
        uint32_t out = words[0][0];  // not by index, so that a GPU keeps the words in registers
        for (uint32_t i = 1; i < 4; i++) out = token / 16 % 4 == i ? words[i][0] : out;
        return out;
    }

    // In [0, 1), with 53 bits.
    SM_EVERYWHERE double uniform() const {
        uint32_t words[4][1];
        fill<1>(words, 0);
        return static_cast<double>((uint64_t{words[0][0]} << 21) | (words[1][0] >> 11)) * 0x1p-53;
    }
};

}  // namespace
}  // namespace speculative_mamba
