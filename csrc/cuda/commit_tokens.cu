// A warp for every row: its lanes look for a stop token in all of the window at once, and the first of them commits.
#include "device.cuh"

namespace speculative_mamba::cuda {
namespace {

constexpr int kRows = 4;  // of a block

__global__ void __launch_bounds__(kRows* kWarp) commit(CommitTokensParams p) {
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (row >= p.batch) return;
    const int64_t* drafted = p.drafted + row * p.lookahead;
    int64_t* record = p.record + row * (p.lookahead + kRecordColumns);

    const bool active = load_raw(p.active + row);
    const int accepted = active ? load_raw(p.accepted + row) : 0, verdict = active ? load_raw(p.verdicts + row) : 0;
    const int counted = active ? load_raw(p.limits + row) : 0;
    const int window = active ? accepted + 1 : 0, room = load_raw(p.room + row);
    const int limit = !active || verdict != 0 ? 0 : (accepted < room ? accepted : room) + 1;
    auto token_at = [&](int t) { return load_raw(t < accepted ? drafted + t : p.following + row); };
    int first_stop = limit;
    for (int t = lane; t <= p.lookahead; t += kWarp) {
        const int64_t token = t < window ? token_at(t) : 0;
        store_raw(record + 4 + t, token);
        if (t < first_stop && load_raw(p.is_stop + token)) first_stop = t;
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, first_stop, mask);
        first_stop = other < first_stop ? other : first_stop;
    }
    const bool stops = first_stop < limit;
    const int count = stops ? first_stop + 1 : limit;
    const bool goes_on = count > 0 && !stops && room >= count;
    for (int s = lane; s < p.steps; s += kWarp) {
        store_raw(p.slots + s * p.batch + row, !goes_on ? -1 : s == 0 ? count - 1 : s);
    }

    __syncwarp();  // every lane has read what the first will overwrite
    if (lane != 0) return;
    store_raw(record, static_cast<int64_t>(count));
    store_raw(record + 1, static_cast<int64_t>(accepted));
    store_raw(record + 2, static_cast<int64_t>(verdict));
    store_raw(record + 3, counted < p.lookahead ? static_cast<int64_t>(counted) : p.lookahead);
    store_raw(p.active + row, goes_on);
    if (count == 0) return;
    int64_t* last = p.last + 2 * row;
    const int64_t position = load_raw(p.positions + row);
    store_raw(last, count > 1 ? token_at(count - 2) : load_raw(last + 1));
    store_raw(last + 1, token_at(count - 1));
    store_raw(p.positions + row, position + count);
    store_raw(p.room + row, room - count);
    for (int t = 0; t < count; t++) {
        const int64_t token = token_at(t), at = position + t;
        if (p.output_counts) {
            int32_t* count = p.output_counts + row * p.vocabulary + token;
            store_raw(count, load_raw(count) + 1);
        }
        if (p.text && at < p.capacity) store_raw(p.text + row * p.capacity + at, token);
    }
}

}  // namespace

void commit_tokens(const CommitTokensParams& p, cudaStream_t stream) {
    launch(commit, dim3(blocks_for(p.batch, kRows)), dim3(kRows * kWarp), stream, p);
}

}  // namespace speculative_mamba::cuda
