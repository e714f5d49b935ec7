// The law of a position of which many tokens can matter, in launches that share its chunks among blocks.
#pragma once

#include "draw.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kChunkThreads = 256, kMine = kChunk / kChunkThreads;

template <typename Params>
inline dim3 chunks_of_all(const Params& p, int64_t tokens) {
    return {static_cast<unsigned>(chunks_of(p.vocabulary)), static_cast<unsigned>(p.batch),
            static_cast<unsigned>(tokens)};
}

// The logits that this thread has of its block's chunk: of two counters of noise four tokens each.
struct Mine {
    float logits[kMine];  // -inf where there is no token

    __device__ static int counter(int i) {
        return static_cast<int>(blockIdx.x) * (kChunk / 4) + static_cast<int>(threadIdx.x) + i / 4 * kChunkThreads;
    }
    __device__ static int token(int i) { return counter(i) / 16 * 64 + counter(i) % 16 + i % 4 * 16; }
    __device__ explicit Mine(const Logits& all) {
#pragma unroll
        for (int i = 0; i < kMine; i++) logits[i] = token(i) < all.vocabulary ? all[token(i)] : -HUGE_VALF;
    }
    template <typename Act>
    __device__ void for_each(Act act) const {
#pragma unroll
        for (int i = 0; i < kMine; i++) act(i, token(i), logits[i]);
    }
};

// Sums weights by bins.
template <typename Params>
__global__ void __launch_bounds__(kChunkThreads, 2) tally(Params p) {
    SM_BLOCK_MEMORY(memory);
    wait_for_previous();
    const int64_t row = blockIdx.y;
    const Position position = position_of(p, row, blockIdx.z);
    const bool active = is_active(p, row);
    const Mine mine(position.logits);
    Law law;
    if (law.begin(memory, position, p.filters) != Verdict::ok || !active) return;
    const Memory of_position{position.scratch.tally(), position.scratch.tally() + kBins, nullptr, nullptr};
    const Histogram histogram{memory}, all{of_position};
    histogram.clear();
    mine.for_each([&](int, int, float logit) {
        const int bin = law.weigh.bin(logit);
        if (bin < kBins) histogram.add(bin, to_units(law.weigh(logit)));
    });
    __syncthreads();
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kChunkThreads)
        if (const uint64_t sum = histogram.at(bin)) all.add(bin, sum);
}

// Where top-k and top-p end a law, by one block.
template <typename Params>
__global__ void __launch_bounds__(kMaxThreads, 1) cut(Params p) {
    SM_BLOCK_MEMORY(memory);
    SM_LIST(list);
    wait_for_previous();
    const int64_t row = blockIdx.x;
    const Position position = position_of(p, row, blockIdx.y);
    Law law;
    if (law.begin(memory, position, p.filters) != Verdict::ok || !is_active(p, row)) return;
    uint64_t enough = 0;  // for a nucleus
    bool is_cut = false;
    if (ranks(p.filters, p.vocabulary)) {
        law.keep(memory, static_cast<uint64_t>(p.filters.top_k), Law::By::rank);
        is_cut = p.filters.top_p == 1.f;
        if (!is_cut) enough = nucleus_of(p.filters, law.total(memory));
    } else {
        const Histogram histogram{memory};
        uint64_t total = 0;
        for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
            store_raw(memory.low + i, load_raw(position.scratch.tally() + i));
            store_raw(memory.high + i, load_raw(position.scratch.tally() + kBins + i));
            total += histogram.at(i);
        }
        enough = nucleus_of(p.filters, of_block(memory, total, plus));
        const Histogram::Found last = histogram.find(enough);
        list.clear();
        for_each_logit(law.logits, law.logits.vocabulary, [&](int token, float logit) {
            if (law.weigh.bin(logit) == last.bin) list.add(token, logit, to_units(law.weigh(logit)));
        });
        const int size = list.size();
        is_cut = size <= kListed;
        if (is_cut) {
            list.rank(size);
            law.cut(list, size, enough - last.before);
        }
    }
    if (!is_cut) law.keep(memory, enough, Law::By::weight);
    if (threadIdx.x == 0) store_raw(position.scratch.last(), leader_of(law.last_place, law.last_id));
}

// The law that a cut leaves, of all tokens if there was none.
__device__ __forceinline__ Verdict finish(const Memory& m, const Position& position, const Filters& f, Law& law) {
    const bool is_cut = cuts(f, position.logits.vocabulary);
    const uint64_t last = is_cut ? load_raw(position.scratch.last()) : 0;
    const Verdict verdict = law.begin(m, position, f);
    if (is_cut) law.last_place = static_cast<uint32_t>(last >> 32), law.last_id = token_of(last);
    law.lightest = lightest_of(f);
    return verdict;
}

// A race of this thread's tokens with measure(token, weight).
template <typename Measure>
__device__ __forceinline__ uint64_t race(const Mine& mine, const Law& law, const Noise& noise, Measure measure) {
    Race race;
#pragma unroll
    for (int first = 0; first < kMine; first += 4) {
        float weights[4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = mine.token(first + i);
            weights[i] = measure(token, law.weight(token, mine.logits[first + i]));
            any |= weights[i] > 0.f;
        }
        if (!any) continue;
        uint32_t words[4][1];
        noise.fill<1>(words, static_cast<uint32_t>(mine.counter(first)));
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (weights[i] > 0.f) race.enter(mine.token(first + i), weights[i], words[i][0]);
    }
    return race.result();
}

// Of each chunk the sum of its weights, and the winner of its race.
template <typename Params>
__global__ void __launch_bounds__(kChunkThreads, 2) contend(Params p) {
    SM_BLOCK_SUMS(memory);
    wait_for_previous();
    const int64_t row = blockIdx.y, t = blockIdx.z;
    const Position position = position_of(p, row, t);
    const Noise noise = noise_at(p, row, t);
    const bool active = is_active(p, row);
    const Mine mine(position.logits);
    Law law;
    if (finish(memory, position, p.filters, law) != Verdict::ok || !active) return;
    uint64_t total = 0;
    const uint64_t result = race(mine, law, noise, [&](int, float weight) {
        total += to_units(weight);
        return weight;
    });
    total = of_block(memory, total, plus);
    const uint64_t winner = of_block(memory, result, smaller);
    if (threadIdx.x != 0) return;
    store_raw(position.scratch.totals() + blockIdx.x, total);
    store_raw(position.scratch.winners() + blockIdx.x, winner);
}

// What the chunks of a position found together, by a block.
template <typename Combine>
__device__ __forceinline__ uint64_t of_chunks(const Memory& m, const Position& position, const uint64_t* found,
                                              uint64_t nothing, Combine combine) {
    const int chunks = static_cast<int>(chunks_of(position.logits.vocabulary));
    uint64_t mine = nothing;
    for (int i = static_cast<int>(threadIdx.x); i < chunks; i += static_cast<int>(blockDim.x))
        mine = combine(mine, load_raw(found + i));
    return of_block(m, mine, combine);
}
struct Chosen {
    float scale;
    int token;
};
__device__ __forceinline__ Chosen chosen_of(const Memory& m, const Position& position) {
    return {scale_of(of_chunks(m, position, position.scratch.totals(), 0, plus)),
            winner_of(of_chunks(m, position, position.scratch.winners(), ~uint64_t{0}, smaller))};
}

// The launches from a survey to contend().
template <typename Params>
inline void launch_contest(const Params& p, int64_t tokens, cudaStream_t stream) {
    const dim3 chunks = chunks_of_all(p, tokens);
    if (tallies(p.filters, p.vocabulary)) launch(tally<Params>, chunks, dim3(kChunkThreads), stream, p);
    if (cuts(p.filters, p.vocabulary))
        launch(cut<Params>, dim3(chunks.y, chunks.z), threads_for(p.vocabulary), stream, p);
    launch(contend<Params>, chunks, dim3(kChunkThreads), stream, p);
}

}  // namespace
}  // namespace speculative_mamba::cuda
