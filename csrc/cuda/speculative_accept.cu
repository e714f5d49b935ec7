// A block decides a position of a row as if all tokens before it stood; a second launch takes a row's first refusal.
#include "draw.cuh"

namespace speculative_mamba::cuda {
namespace {

// A decision is the token that is chosen, or this, or less by the verdict.
constexpr int64_t kStands = -1;
__device__ __forceinline__ int64_t decision(Verdict verdict) { return kStands - static_cast<int64_t>(verdict); }

// The position of a row's window that has no drafted token.
__device__ __forceinline__ int64_t end_of(const SpeculativeAcceptParams& p, int64_t row) {
    const int64_t end = p.tokens - 1, limit = p.limits ? load_raw(p.limits + row) : end;
    return limit < 0 ? 0 : limit < end ? limit : end;
}

__device__ __forceinline__ int64_t decide_at(const SpeculativeAcceptParams& p, const Memory& m, int64_t row,
                                             int64_t t) {
    const float* logits = p.logits + row * p.logits_batch_stride + t * p.logits_token_stride;
    const bool* seen = p.seen + row * p.vocabulary;
    const int64_t* drafted = p.drafted + row * (p.tokens - 1);
    const int vocabulary = static_cast<int>(p.vocabulary);
    Law law;
    law.logits = {logits, vocabulary, p.filters.repetition_penalty, seen, drafted, t};
    const Verdict verdict = law.make(m, p.filters);
    if (verdict != Verdict::ok) return decision(verdict);
    Noise noise = noise_of(p.keys + 2 * row, load_raw(p.positions + row) + t, Purpose::token);
    const bool last = t == end_of(p, row);
    int drafted_here = last ? -1 : static_cast<int>(load_raw(drafted + t));
    if (!last && law.temperature != 0.f && !p.coupled) {
        const float* laws = p.laws ? p.laws + row * p.laws_batch_stride + t * p.laws_token_stride : nullptr;
        auto of_draft = [&](int token) { return laws ? load(laws + token) : token == drafted_here ? 1.f : 0.f; };
        const float scale = scale_of(law.total(m));
        const double q = of_draft(drafted_here), target = law.weight(drafted_here) * scale;
        if (!(q > 0 && q < HUGE_VAL)) return decision(Verdict::bad_draft_law);
        noise.purpose = Purpose::test;
        if (noise.uniform() * q < target) return kStands;
        noise.purpose = Purpose::token;
        // What the target has and the draft lacks: max(p - q, 0), on the tokens of positive p.
        constexpr uint64_t kSome = 1, kBroken = 2;
        uint64_t met = 0;
        const int choice = draw(m, vocabulary, noise, [&](int token) {
            const float of_target = law.weight(token) * scale;
            const float rest = of_target > 0.f ? of_target - of_draft(token) : 0.f;
            met |= (rest > 0.f ? kSome : 0) | (rest < HUGE_VALF ? 0 : kBroken);
            return rest > 0.f ? rest : 0.f;
        });
        met = of_block(m, met, either);
        if (met == kSome) return choice;
        // The laws' own rounding can leave a refused token's excess uncovered; the target's law is the limit then.
        if (met != 0 || q - target >= kRounding) return decision(Verdict::bad_residual);
        drafted_here = -1;
    }
    const int choice = choose(m, law, noise).token;
    return choice == drafted_here ? kStands : choice;
}

__global__ void __launch_bounds__(kMaxThreads, 1) decide(SpeculativeAcceptParams p) {
    SM_BLOCK_MEMORY(memory);
    wait_for_previous();
    const int64_t t = blockIdx.x, row = blockIdx.y;
    if ((p.active && !load_raw(p.active + row)) || t > end_of(p, row)) return;
    const int64_t decided = decide_at(p, memory, row, t);
    if (threadIdx.x == 0) store_raw(p.decisions + row * p.tokens + t, decided);
}

constexpr int kRows = 128;

__global__ void __launch_bounds__(kRows) settle(SpeculativeAcceptParams p) {
    wait_for_previous();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x;
    if (row >= p.batch) return;
    int64_t accepted = 0, decided = 0;
    if (!p.active || load_raw(p.active + row)) {
        while ((decided = load_raw(p.decisions + row * p.tokens + accepted)) == kStands) accepted++;
    }
    const bool ok = decided >= 0;
    store_raw(p.accepted + row, static_cast<int32_t>(accepted));
    store_raw(p.next + row, ok ? decided : 0);
    store_raw(p.verdicts + row, static_cast<int32_t>(ok ? 0 : kStands - decided));
}

}  // namespace

void speculative_accept(const SpeculativeAcceptParams& p, cudaStream_t stream) {
    const dim3 positions(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
    launch(decide, positions, threads_for(p.vocabulary), stream, p);
    launch(settle, dim3(blocks_for(p.batch, kRows)), dim3(kRows), stream, p);
}

}  // namespace speculative_mamba::cuda
