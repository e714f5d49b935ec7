// A warp for every row: its lanes look for a stop token in all of the window at once, and the first of them commits.
#include "block.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kRows = 4;  // of a block

__global__ void __launch_bounds__(kRows* kWarp) commit(CommitTokensParams p) {
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, lookahead = static_cast<int>(p.lookahead);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (row >= p.batch) return;
    const int64_t* draft_tokens = p.draft_tokens + row * lookahead;
    int64_t* record = p.record + row * (Record::tokens + lookahead + 1);
    auto min = [](int a, int b) { return a < b ? a : b; };
    auto max = [](int a, int b) { return a > b ? a : b; };
    auto is_stop = [&](int64_t token) { return load_raw(p.is_stop + row * p.vocabulary + token); };

    const bool active = load_raw(p.active + row);
    int num_draft_tokens = active ? lookahead : 0;
    if (active && p.num_draft_tokens) num_draft_tokens = min(lookahead, load_raw(p.num_draft_tokens + row));

    int draft_status = 0;
    if (p.draft_status) {
        int counted = num_draft_tokens;
        for (int t = lane; t < counted; t += kWarp)
            if (is_stop(load_raw(draft_tokens + t))) counted = t + 1;
        counted = warp_reduce<kWarp>(counted, min);
#pragma unroll 1  // a window of at most a warp's tokens is the common one
        for (int t = lane; t < counted; t += kWarp)
            draft_status = max(draft_status, load_raw(p.draft_status + t * p.batch + row));
        draft_status = warp_reduce<kWarp>(draft_status, max);
    }

    const int accepted = active ? load_raw(p.accepted + row) : 0,
              row_status = active ? load_raw(p.row_status + row) : 0;
    const int window = active ? accepted + 1 : 0, remaining = load_raw(p.remaining + row);
    const bool commits = active && row_status == 0 && draft_status == 0;
    const int limit = commits ? min(window, remaining) : 0;
    auto token_at = [&](int t) { return load_raw(t < accepted ? draft_tokens + t : p.next_token + row); };
    int first_stop = limit;
    for (int t = lane; t <= lookahead; t += kWarp) {
        const int64_t token = t < window ? token_at(t) : 0;
        store_raw(record + Record::tokens + t, token);
        if (t < first_stop && is_stop(token)) first_stop = t;
    }
    first_stop = warp_reduce<kWarp>(first_stop, min);
    const bool stops = first_stop < limit;
    const int count = stops ? first_stop + 1 : limit;
    FinishReason reason = FinishReason::none;
    if (commits && remaining == count) reason = FinishReason::length;
    if (stops) reason = FinishReason::eos;
    const bool goes_on = commits && reason == FinishReason::none;
    for (int s = lane; s < p.steps; s += kWarp) {
        store_raw(p.slots + s * p.batch + row, !goes_on ? -1 : s == 0 ? count - 1 : s);
    }

    __syncwarp();  // every lane has read what the first will overwrite
    if (lane != 0) return;
    store_raw(record + Record::num_committed, static_cast<int64_t>(count));
    store_raw(record + Record::accepted, static_cast<int64_t>(accepted));
    store_raw(record + Record::row_status, static_cast<int64_t>(row_status));
    store_raw(record + Record::draft_status, static_cast<int64_t>(draft_status));
    store_raw(record + Record::num_draft_tokens, static_cast<int64_t>(num_draft_tokens));
    store_raw(record + Record::finish_reason, static_cast<int64_t>(reason));
    store_raw(p.active + row, goes_on);
    if (count == 0) return;
    int64_t* last = p.last + 2 * row;
    const int64_t position = load_raw(p.positions + row);
    store_raw(last, count > 1 ? token_at(count - 2) : load_raw(last + 1));
    store_raw(last + 1, token_at(count - 1));
    store_raw(p.positions + row, position + count);
    store_raw(p.remaining + row, remaining - count);
    for (int t = 0; t < count; t++) {
        const int64_t token = token_at(t), at = position + t;
        if (p.output_counts) {
            int32_t* output_count = p.output_counts + row * p.vocabulary + token;
            store_raw(output_count, load_raw(output_count) + 1);
        }
        if (p.text && at < p.capacity) store_raw(p.text + row * p.capacity + at, token);
    }
}

}  // namespace

void commit_tokens(const CommitTokensParams& p, cudaStream_t stream) {
    launch(commit, dim3(blocks_for(p.batch, kRows)), dim3(kRows * kWarp), stream, p);
}

}  // namespace speculative_mamba::cuda
