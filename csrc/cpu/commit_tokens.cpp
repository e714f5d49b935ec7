// Token by token, a row after the other.
#include <algorithm>

#include "kernels.h"

namespace speculative_mamba::SM_ISA {
namespace {

// The largest status of the draft tokens that count: none behind a stop token does.
int64_t draft_status(const CommitTokensParams& p, int64_t b, int64_t num_draft_tokens) {
    const bool* is_stop = p.is_stop + b * p.vocabulary;
    int32_t status = 0;
    for (int64_t t = 0; p.draft_status && t < num_draft_tokens; t++) {
        status = std::max(status, p.draft_status[t * p.batch + b]);
        if (is_stop[p.draft_tokens[b * p.lookahead + t]]) break;
    }
    return status;
}

// Appends the window of a row to its text. Why the row ends.
FinishReason append(const CommitTokensParams& p, int64_t b, const int64_t* window, int64_t size, int64_t& count) {
    int64_t* last = p.last + 2 * b;
    while (count < size && p.remaining[b] > 0) {
        const int64_t token = window[count++], at = p.positions[b]++;
        p.remaining[b]--;
        last[0] = last[1];
        last[1] = token;
        if (p.output_counts) p.output_counts[b * p.vocabulary + token]++;
        if (p.text && at < p.capacity) p.text[b * p.capacity + at] = token;
        if (p.is_stop[b * p.vocabulary + token]) return FinishReason::eos;
    }
    return p.remaining[b] > 0 ? FinishReason::none : FinishReason::length;
}

// Fills an active row's record and commits what it says. Whether the row goes on.
bool commit(const CommitTokensParams& p, int64_t b, int64_t* record) {
    const int64_t accepted = p.accepted[b];
    const int64_t num_draft_tokens =
        p.num_draft_tokens ? std::min<int64_t>(p.num_draft_tokens[b], p.lookahead) : p.lookahead;
    record[Record::accepted] = accepted;
    record[Record::row_status] = p.row_status[b];
    record[Record::draft_status] = draft_status(p, b, num_draft_tokens);
    record[Record::num_draft_tokens] = num_draft_tokens;
    std::copy_n(p.draft_tokens + b * p.lookahead, accepted, record + Record::tokens);
    record[Record::tokens + accepted] = p.next_token[b];
    if (record[Record::row_status] || record[Record::draft_status]) return false;
    const FinishReason reason = append(p, b, record + Record::tokens, accepted + 1, record[Record::num_committed]);
    record[Record::finish_reason] = static_cast<int64_t>(reason);
    return reason == FinishReason::none;
}

}  // namespace

void commit_tokens(const CommitTokensParams& p, int) {
    const int64_t columns = Record::tokens + p.lookahead + 1;
    for (int64_t b = 0; b < p.batch; b++) {
        int64_t* record = p.record + b * columns;
        std::fill_n(record, columns, 0);
        p.active[b] = p.active[b] && commit(p, b, record);
        for (int64_t s = 0; s < p.steps; s++) {
            const int64_t slot = s == 0 ? record[Record::num_committed] - 1 : s;
            p.slots[s * p.batch + b] = p.active[b] ? static_cast<int32_t>(slot) : -1;
        }
    }
}

}  // namespace speculative_mamba::SM_ISA
