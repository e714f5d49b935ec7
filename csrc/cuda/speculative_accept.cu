// A survey of all logits; then a block decides a position of a row as if all tokens before it stood, or for greedy
// decoding a warp; and a row's first refusal is its answer.
#include "draw.cuh"

namespace speculative_mamba::cuda {
namespace {

// A decision is the token that is chosen, or this, or less by the verdict.
constexpr int64_t kStands = -1;
__device__ __forceinline__ int64_t decision(Verdict verdict) { return kStands - static_cast<int64_t>(verdict); }

// By a warp: the first decision of a row by which a drafted token does not stand.
__device__ __forceinline__ void settle_row(const SpeculativeAcceptParams& p, int64_t row, bool active) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int64_t accepted = 0, decided = 0;
    if (active) {
        for (accepted = lane;; accepted += kWarp) {
            decided = accepted < p.tokens ? load_raw(p.decisions + row * p.tokens + accepted) : kStands;
            const int first = least_of_lanes<kWarp>(decided != kStands ? lane : kWarp);
            if (first == lane) break;
            if (first < kWarp) return;
        }
    } else if (lane > 0) {
        return;
    }
    const bool ok = decided >= 0;
    store_raw(p.accepted + row, static_cast<int32_t>(accepted));
    store_raw(p.next + row, ok ? decided : 0);
    store_raw(p.verdicts + row, static_cast<int32_t>(ok ? 0 : kStands - decided));
}

constexpr int kMostWarps = 16;

// A warp for each position of a row.
__global__ void __launch_bounds__(kMostWarps* kWarp) decide_greedily(SpeculativeAcceptParams p) {
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t row = blockIdx.x;
    const bool active = is_active(p, row);
    for (int64_t t = warp; t < p.tokens; t += blockDim.x / kWarp) {
        const int64_t drafted = t + 1 < p.tokens ? load_raw(p.drafted + row * (p.tokens - 1) + t) : -1;
        const Leader leader = leader_of(position_of(p, row, t));
        const bool stands = leader.verdict == Verdict::ok && leader.token == drafted;
        const int64_t decided = leader.verdict != Verdict::ok ? decision(leader.verdict) : leader.token;
        if (lane == 0) store_raw(p.decisions + row * p.tokens + t, stands ? kStands : decided);
    }
    __syncthreads();
    if (warp == 0) settle_row(p, row, active);
}

template <typename Law>
__device__ __forceinline__ int64_t decide_by(const Law& law, const SpeculativeAcceptParams& p, const Memory& m,
                                             int64_t row, int64_t t, Noise noise, int drafted) {
    if (drafted >= 0 && !p.coupled) {
        const float* laws = p.laws ? p.laws + row * p.laws_batch_stride + t * p.laws_token_stride : nullptr;
        auto of_draft = [&](int token) { return laws ? load(laws + token) : token == drafted ? 1.f : 0.f; };
        const float scale = law.scale(m);
        const double q = of_draft(drafted), target = law.weight_of(m, drafted) * scale;
        if (!(q > 0 && q < HUGE_VAL)) return decision(Verdict::bad_draft_law);
        noise.purpose = Purpose::test;
        if (noise.uniform() * q < target) return kStands;
        noise.purpose = Purpose::token;
        // What the target has and the draft lacks: max(p - q, 0), on the tokens of positive p.
        constexpr uint64_t kSome = 1, kBroken = 2;
        uint64_t met = 0;
        const int choice = draw(m, law, noise, [&](int token, float weight) {
            const float of_target = weight * scale;
            const float rest = of_target > 0.f ? of_target - of_draft(token) : 0.f;
            met |= (rest > 0.f ? kSome : 0) | (rest < HUGE_VALF ? 0 : kBroken);
            return rest > 0.f ? rest : 0.f;
        });
        met = of_block(m, met, either);
        if (met == kSome) return choice;
        // The laws' own rounding can leave a refused token's excess uncovered; the target's law is the limit then.
        if (met != 0 || q - target >= kRounding) return decision(Verdict::bad_residual);
        drafted = -1;
    }
    const int choice = draw(m, law, noise);
    return choice == drafted ? kStands : choice;
}

__global__ void __launch_bounds__(kMaxThreads, 1) decide(SpeculativeAcceptParams p, int shortlist) {
    SM_BLOCK_MEMORY(memory);
    SM_LIST_MEMORY(list_memory);
    wait_for_previous();
    const int64_t t = blockIdx.x, row = blockIdx.y;
    const bool active = is_active(p, row);
    const int drafted = t + 1 < p.tokens ? static_cast<int>(load_raw(p.drafted + row * (p.tokens - 1) + t)) : -1;
    const Noise noise = noise_of(p.keys + 2 * row, load_raw(p.positions + row) + t, Purpose::token);
    if (!active) return;
    const Position position = position_of(p, row, t);
    Verdict verdict = Verdict::ok;
    Shortlist listed{list_memory};
    int64_t decided;
    if (shortlist && listed.make(memory, position, p.filters, shortlist, verdict)) {
        decided = verdict == Verdict::ok ? decide_by(listed, p, memory, row, t, noise, drafted) : decision(verdict);
    } else {
        Law law;
        law.logits = position.logits;
        verdict = law.make(memory, p.filters);
        decided = verdict == Verdict::ok ? decide_by(law, p, memory, row, t, noise, drafted) : decision(verdict);
    }
    if (threadIdx.x == 0) store_raw(p.decisions + row * p.tokens + t, decided);
}

__global__ void __launch_bounds__(kWarp) settle(SpeculativeAcceptParams p) {
    wait_for_previous();
    settle_row(p, blockIdx.x, is_active(p, blockIdx.x));
}

}  // namespace

void speculative_accept(const SpeculativeAcceptParams& p, cudaStream_t stream) {
    const dim3 rows(static_cast<unsigned>(p.batch));
    if (p.filters.temperature == 0.f) {
        launch_survey<true>(p, p.tokens, stream);
        const auto warps = static_cast<unsigned>(p.tokens < kMostWarps ? p.tokens : kMostWarps);
        return launch(decide_greedily, rows, dim3(warps * kWarp), stream, p);
    }
    const dim3 positions(static_cast<unsigned>(p.tokens), rows.x);
    const int shortlist = shortlist_for(p.vocabulary, p.filters);
    if (shortlist) launch_survey<false>(p, p.tokens, stream);
    launch(decide, positions, threads_for(p.vocabulary), stream, p, shortlist);
    launch(settle, rows, dim3(kWarp), stream, p);
}

}  // namespace speculative_mamba::cuda
