// A survey of all logits; then a block decides a position of a row as if all tokens before it stood, or for greedy
// decoding a warp; and a row's first refusal is its answer.
#include "kernels.h"
#include "spread.cuh"

namespace speculative_mamba::cuda {
namespace {

// A decision is the token that is chosen, or this, or less by the verdict.
constexpr int64_t kStands = -1;
__device__ __forceinline__ int64_t decision(Verdict verdict) { return kStands - static_cast<int64_t>(verdict); }

// (K+1) of a row, behind the memory of all positions.
__device__ __forceinline__ int64_t* decisions_of(const SpeculativeAcceptParams& p, int64_t row) {
    const int64_t positions = p.batch * p.tokens;
    return reinterpret_cast<int64_t*>(p.scratch + positions * scratch_of(p.vocabulary)) + row * p.tokens;
}

// By a warp: the first decision of a row by which a drafted token does not stand.
__device__ __forceinline__ void settle_row(const SpeculativeAcceptParams& p, int64_t row, bool active) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int64_t t = lane;; t += kWarp) {
        int64_t decided = t < p.tokens ? load_raw(decisions_of(p, row) + t) : kStands;
        if (!active) decided = 0;
        const int first = least_of_lanes<kWarp>(decided == kStands ? kWarp : lane);
        if (first == kWarp) continue;
        if (lane != first) return;
        const bool ok = decided >= 0;
        store_raw(p.accepted + row, static_cast<int32_t>(t));
        store_raw(p.next + row, ok ? decided : 0);
        return store_raw(p.verdicts + row, static_cast<int32_t>(ok ? 0 : kStands - decided));
    }
}

constexpr int kMostWarps = 16;

// By a block: decided(t, position), by a warp each, and then the first refusal.
template <typename Decide>
__device__ __forceinline__ void settle_by(const SpeculativeAcceptParams& p, Decide decided) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t row = blockIdx.x;
    const bool active = is_active(p, row);
    for (int64_t t = warp; t < p.tokens; t += blockDim.x / kWarp) {
        const int64_t decision = decided(t, position_of(p, row, t));
        if (lane == 0) store_raw(decisions_of(p, row) + t, decision);
    }
    __syncthreads();
    if (warp == 0) settle_row(p, row, active);
}

// -1 after the last drafted token that counts.
__device__ __forceinline__ int drafted_at(const SpeculativeAcceptParams& p, int64_t row, int64_t t) {
    const int drafted = t + 1 < p.tokens ? static_cast<int>(load_raw(p.drafted + row * (p.tokens - 1) + t)) : -1;
    return p.limits && load_raw(p.limits + row) <= t ? -1 : drafted;
}

__global__ void __launch_bounds__(kMostWarps* kWarp) decide_greedily(SpeculativeAcceptParams p) {
    wait_for_previous();
    settle_by(p, [&](int64_t t, const Position& position) {
        const int drafted = drafted_at(p, blockIdx.x, t);
        const Leader leader = leader_of(position);
        if (leader.verdict != Verdict::ok) return decision(leader.verdict);
        return leader.token == drafted ? kStands : leader.token;
    });
}

// The test of a drafted token, and what is left where it is refused.
struct Test {
    const float* law;  // (V): the draft's; null: it was certain
    int drafted;       // -1 where nothing is tested
    double q = 0, p = 0;
    float scale = 0.f;

    __device__ Test(const SpeculativeAcceptParams& a, int64_t row, int64_t t, int drafted)
        : law(a.laws ? a.laws + row * a.laws_batch_stride + t * a.laws_token_stride : nullptr),
          drafted(a.coupled ? -1 : drafted) {
        if (takes_place()) q = of_draft(drafted);
    }
    __device__ bool takes_place() const { return drafted >= 0; }
    __device__ float of_draft(int token) const { return law ? load(law + token) : token == drafted ? 1.f : 0.f; }
    __device__ bool is_valid() const { return q > 0 && q < HUGE_VAL; }
    __device__ bool accepts(Noise noise, float weight, float scale_of_law) {
        scale = scale_of_law, p = weight * scale;
        noise.purpose = Purpose::test;
        return noise.uniform() * q < p;
    }
    // What the target has and the draft lacks: max(p - q, 0), on the tokens of positive p.
    static constexpr uint64_t kSome = 1, kBroken = 2, kRefused = 4;
    __device__ float rest(int token, float weight, uint64_t& met) const {
        const float of_target = weight * scale;
        const float rest = of_target > 0.f ? of_target - of_draft(token) : 0.f;
        met |= (rest > 0.f ? kSome : 0) | (rest < HUGE_VALF ? 0 : kBroken);
        return rest > 0.f ? rest : 0.f;
    }
    // The laws' own rounding can leave a refused token's excess uncovered; the target's law is the limit then.
    __device__ bool rounds() const { return q - p < kRounding; }
};

__device__ __forceinline__ int64_t decide_by(const Shortlist& few, const Memory& m, Test& test, const Noise& noise,
                                             int drafted) {
    if (test.takes_place()) {
        if (!test.is_valid()) return decision(Verdict::bad_draft_law);
        if (test.accepts(noise, few.weight_of(m, drafted), few.scale())) return kStands;
        uint64_t met = 0;
        const int choice = draw(m, few, noise, [&](int token, float weight) { return test.rest(token, weight, met); });
        met = of_block(m, met, either);
        if (met == Test::kSome) return choice;
        if (met != 0 || !test.rounds()) return decision(Verdict::bad_residual);
        drafted = -1;
    }
    const int choice = draw(m, few, noise);
    return choice == drafted ? kStands : choice;
}

__global__ void __launch_bounds__(kMaxThreads, 1) decide_few(SpeculativeAcceptParams p, int most) {
    SM_BLOCK_MEMORY(memory);
    SM_SHORTLIST(few);
    wait_for_previous();
    const int64_t t = blockIdx.x, row = blockIdx.y;
    const Position position = position_of(p, row, t);
    const Noise noise = noise_at(p, row, t);
    const int drafted = drafted_at(p, row, t);
    const bool active = is_active(p, row);
    Law law;
    const Verdict verdict = law.begin(memory, position, p.filters);
    if (!active) return;
    int64_t decided = decision(verdict);
    if (verdict == Verdict::ok) {
        Test test(p, row, t, drafted);
        few.make(memory, law, groups_of(position), p.filters, most);
        decided = decide_by(few, memory, test, noise, drafted);
    }
    if (threadIdx.x == 0) store_raw(decisions_of(p, row) + t, decided);
}

__global__ void __launch_bounds__(kWarp) settle(SpeculativeAcceptParams p) {
    wait_for_previous();
    settle_row(p, blockIdx.x, is_active(p, blockIdx.x));
}

// Decides, but for the token that replaces a refused one: of it the chunks find their winners.
__global__ void __launch_bounds__(kChunkThreads, 2) decide_many(SpeculativeAcceptParams p) {
    SM_BLOCK_SUMS(memory);
    wait_for_previous();
    const int64_t row = blockIdx.y, t = blockIdx.z;
    const Position position = position_of(p, row, t);
    const Noise noise = noise_at(p, row, t);
    const int drafted = drafted_at(p, row, t);
    const bool active = is_active(p, row);
    const Mine mine(position.logits);
    Law law;
    const Verdict verdict = finish(memory, position, p.filters, law);
    if (!active) return;
    int64_t decided = decision(verdict);
    uint64_t met = 0, winner = 0;
    if (verdict == Verdict::ok) {
        Test test(p, row, t, drafted);
        const Chosen chosen = chosen_of(memory, position);
        decided = chosen.token == drafted ? kStands : chosen.token;
        if (test.takes_place() && !test.is_valid()) {
            decided = decision(Verdict::bad_draft_law);
        } else if (test.takes_place()) {
            if (test.accepts(noise, law.weight(drafted, law.logits[drafted]), chosen.scale)) {
                decided = kStands;
            } else {
                decided = test.rounds() ? chosen.token : decision(Verdict::bad_residual);
                winner = race(mine, law, noise, [&](int token, float weight) { return test.rest(token, weight, met); });
                winner = of_block(memory, winner, smaller);
                met = of_block(memory, met, either) | Test::kRefused;
            }
        }
    }
    if (threadIdx.x != 0) return;
    store_raw(position.scratch.met() + blockIdx.x, met);
    store_raw(position.scratch.rest() + blockIdx.x, winner);
    if (blockIdx.x == 0) store_raw(decisions_of(p, row) + t, decided);
}

__global__ void __launch_bounds__(kMostWarps* kWarp) settle_many(SpeculativeAcceptParams p) {
    wait_for_previous();
    settle_by(p, [&](int64_t t, const Position& position) {
        const int chunks = static_cast<int>(chunks_of(p.vocabulary)), lane = static_cast<int>(threadIdx.x) % kWarp;
        // The first lane's is what is stored again.
        const int64_t decided = lane == 0 ? load_raw(decisions_of(p, blockIdx.x) + t) : 0;
        uint64_t met = 0, winner = ~uint64_t{0};
#pragma unroll 1
        for (int i = lane; i < chunks; i += kWarp) {
            met |= load_raw(position.scratch.met() + i);
            winner = smaller(winner, load_raw(position.scratch.rest() + i));
        }
        met = of_lanes(met, either), winner = of_lanes(winner, smaller);
        if (met == (Test::kRefused | Test::kSome)) return static_cast<int64_t>(winner_of(winner));
        return met & Test::kBroken ? decision(Verdict::bad_residual) : decided;
    });
}

}  // namespace

void speculative_accept(const SpeculativeAcceptParams& p, cudaStream_t stream) {
    const dim3 rows(static_cast<unsigned>(p.batch));
    const dim3 warps(kWarp * static_cast<unsigned>(p.tokens < kMostWarps ? p.tokens : kMostWarps));
    if (p.filters.temperature == 0.f) {
        launch_survey<true>(p, p.tokens, stream);
        return launch(decide_greedily, rows, warps, stream, p);
    }
    launch_survey<false>(p, p.tokens, stream);
    if (const int most = shortlist_for(p.vocabulary, p.filters)) {
        const dim3 positions(static_cast<unsigned>(p.tokens), rows.x);
        launch(decide_few, positions, threads_for(p.vocabulary), stream, p, most);
        return launch(settle, rows, dim3(kWarp), stream, p);
    }
    launch_contest(p, p.tokens, stream);
    launch(decide_many, chunks_of_all(p, p.tokens), dim3(kChunkThreads), stream, p);
    launch(settle_many, rows, warps, stream, p);
}

}  // namespace speculative_mamba::cuda

int64_t speculative_mamba::scratch_bytes(const SpeculativeAcceptParams& p) {
    return p.batch * p.tokens * (cuda::scratch_of(p.vocabulary) + 1) * static_cast<int64_t>(sizeof(uint64_t));
}
