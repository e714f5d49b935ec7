// Token by token, a row after the other.
#include <algorithm>

#include "kernels.h"

namespace speculative_mamba::SM_ISA {
namespace {

// Fills an active row's record and commits what it says. Whether the row goes on.
bool commit(const CommitTokensParams& p, int64_t b, int64_t* record) {
    int64_t &count = record[0], *window = record + 4, *last = p.last + 2 * b;
    const int64_t accepted = p.accepted[b];
    record[1] = accepted;
    record[2] = p.verdicts[b];
    record[3] = std::min<int64_t>(p.limits[b], p.lookahead);
    std::copy_n(p.drafted + b * p.lookahead, accepted, window);
    window[accepted] = p.following[b];
    if (p.verdicts[b]) return false;
    bool stops = false;
    while (!stops && count <= accepted && p.room[b] >= 0) {
        const int64_t token = window[count++], at = p.positions[b]++;
        stops = p.is_stop[token];
        p.room[b]--;
        last[0] = last[1];
        last[1] = token;
        if (p.output_counts) p.output_counts[b * p.vocabulary + token]++;
        if (p.text && at < p.capacity) p.text[b * p.capacity + at] = token;
    }
    return !stops && p.room[b] >= 0;
}

}  // namespace

void commit_tokens(const CommitTokensParams& p, int) {
    for (int64_t b = 0; b < p.batch; b++) {
        int64_t* record = p.record + b * (p.lookahead + kRecordColumns);
        std::fill_n(record, p.lookahead + kRecordColumns, 0);
        p.active[b] = p.active[b] && commit(p, b, record);
        for (int64_t s = 0; s < p.steps; s++) {
            const int64_t slot = s == 0 ? record[0] - 1 : s;
            p.slots[s * p.batch + b] = p.active[b] ? static_cast<int32_t>(slot) : -1;
        }
    }
}

}  // namespace speculative_mamba::SM_ISA
