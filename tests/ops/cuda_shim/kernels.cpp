// The table of kernels that the bindings call, filled with CUDA kernels that run on the CPU. Before each, the memory
// that its arguments describe is announced (announce_all), row by row: whatever lies between is out of bounds.
#include "../../../csrc/cuda/kernels.h"

#include <algorithm>
#include <tuple>

#include "../../../csrc/dtype.h"
#include "cuda_runtime.h"

namespace speculative_mamba {
namespace {

using shim::Use;

int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Memory of `rows` × `columns` runs of `size` elements each.
void announce(const void* base, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride, int64_t size,
              Use use = Use::read, int64_t element = 4) {
    if (!base) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            const char* const run = static_cast<const char*>(base) + element * (r * row_stride + c * column_stride);
            shim::Machine::get().announce(run, static_cast<size_t>(size * element), use);
        }
}

void announce(const void* base, int64_t size, Use use = Use::read) { announce(base, 1, 0, 1, 0, size, use); }

void announce_bytes(const void* base, int64_t bytes, Use use = Use::read) { announce(base, 1, 0, 1, 0, bytes, use, 1); }

template <typename Params>
void announce_activations(const Params& p, const void* base, int64_t rows, int64_t row_stride, int64_t columns,
                          int64_t column_stride, int64_t size) {
    announce(base, rows, row_stride, columns, column_stride, size, Use::read, bytes_of(p.activations));
}

// Weights may be read before the kernels before have ended where the caller says that none of them writes any.
template <typename Params>
Use weights_of(const Params& p) {
    return p.constant_weights ? Use::constant : Use::read;
}

// Of each row that is not left out `size` floats.
template <typename Params>
void announce_inputs(const Params& p, float* base, int64_t size) {
    for (int64_t row = 0; base && row < p.batch; row++) {
        if (p.start_slot[row] >= 0) announce(base + row * size, size, Use::write);
    }
}

template <typename Params>
void announce_result(const Params& p, int64_t size) {
    announce(p.y, 1, 0, 1, 0, size, Use::write, bytes_of(p.activations));
}

// Of each row the slot it starts from, and those it may write.
template <typename Params>
void announce_states(const Params& p, int64_t size) {
    for (int64_t row = 0; row < p.batch; row++) {
        if (p.start_slot[row] < 0) continue;
        auto slot = [&](int64_t number, Use use) {
            const int64_t element = bytes_of(p.states_dtype);
            const int64_t offset = row * p.states_batch_stride + number * p.states_slot_stride;
            announce(static_cast<char*>(p.states) + element * offset, 1, 0, 1, 0, size, use, element);
        };
        const bool materializes = p.input_dt && (p.final_state_only || p.write_slot == 0);
        slot(p.input_dt ? 0 : p.start_slot[row], materializes ? Use::write : Use::read);
        if (p.final_state_only) slot(0, Use::write);
        if (!p.final_state_only && !p.input_dt)
            for (int64_t t = 0; t < p.tokens; t++) slot(p.write_slot + t, Use::write);
    }
}

// Of each row the entries before the window, and those of the window.
void announce_entries(const AttentionParams& p, void* base, int64_t batch_stride, int64_t head_stride) {
    const int64_t element = bytes_of(p.keys_dtype);
    for (int64_t row = 0; row < p.batch; row++) {
        if (p.start_slot[row] < 0) continue;
        const int64_t length = p.lengths[row * p.slots + p.start_slot[row]];
        const int64_t left_padding = p.left_padding ? std::min<int64_t>(p.left_padding[row], p.tokens) : 0;
        auto entries = [&](int64_t first, int64_t count, Use use) {
            char* at = static_cast<char*>(base) + element * (row * batch_stride + first * p.dims);
            announce(at, 1, 0, p.kv_heads, head_stride, count * p.dims, use, element);
        };
        entries(0, length, Use::read);
        entries(length, p.tokens - left_padding, Use::write);
    }
}

void announce_all(const AttentionParams& p) {
    announce_activations(p, p.q, p.batch, p.q_batch_stride, p.tokens, p.q_token_stride, p.heads * p.dims);
    announce_activations(p, p.k, p.batch, p.k_batch_stride, p.tokens, p.k_token_stride, p.kv_heads * p.dims);
    announce_activations(p, p.v, p.batch, p.v_batch_stride, p.tokens, p.v_token_stride, p.kv_heads * p.dims);
    announce_entries(p, p.keys, p.keys_batch_stride, p.keys_head_stride);
    announce_entries(p, p.values, p.values_batch_stride, p.values_head_stride);
    for (int64_t row = 0; row < p.batch; row++) {
        if (p.start_slot[row] < 0) continue;
        int32_t* lengths = p.lengths + row * p.slots;
        announce(lengths + p.start_slot[row], 1);
        announce(lengths + p.write_slot, 1, 1, p.final_state_only ? 1 : p.tokens, 1, 1, Use::write);
    }
    announce(p.start_slot, p.batch);
    announce(p.left_padding, p.batch);
    announce(p.inv_freq, p.pairs);
    announce_bytes(p.scratch, p.scratch_bytes, Use::write);
    announce_result(p, p.batch * p.tokens * p.heads * p.dims);
}

void announce_all(const CausalConv1dParams& p) {
    const int64_t inputs = p.channels / p.repeat;
    announce_activations(p, p.x, p.batch, p.x_batch_stride, p.tokens, p.x_token_stride, inputs);
    announce_activations(p, p.input_gate, p.batch, p.input_gate_batch_stride, p.tokens, p.input_gate_token_stride,
                         inputs);
    announce_activations(p, p.output_gate, p.batch, p.output_gate_batch_stride, p.tokens, p.output_gate_token_stride,
                         p.channels);
    const int64_t element = bytes_of(p.weight_dtype);
    announce(p.weight, p.channels, p.weight_channel_stride, p.width, p.weight_tap_stride, 1, weights_of(p), element);
    announce(p.bias, p.channels, weights_of(p));
    announce(p.start_slot, p.batch);
    announce(p.left_padding, p.batch);
    announce_result(p, p.batch * p.tokens * p.channels);
    const int64_t history = p.width - 1;
    for (int64_t row = 0; row < p.batch; row++) {
        if (p.start_slot[row] < 0) continue;
        float* window = p.window + row * p.window_batch_stride;
        auto rows = [&](int64_t first, int64_t count, Use use) {
            announce(window + first * p.window_row_stride, count, p.window_row_stride, 1, 0, p.channels, use);
        };
        rows(p.start_slot[row] + 1, history, Use::read);
        if (p.final_state_only) rows(1, history, Use::write);
        if (!p.final_state_only && p.write_slot == 0) rows(0, history, Use::write);
        if (!p.final_state_only) rows(history + p.write_slot, p.tokens, Use::write);
    }
}

void announce_all(const ExpertLinearParams& p) {
    announce_activations(p, p.x, p.tokens, p.x_token_stride, p.inputs, p.x_input_stride, p.in_features);
    const int64_t choices = p.tokens * p.top_k, element = bytes_of(p.weight_dtype);
    announce(p.experts, choices);
    announce(p.expert_weights, choices);
    announce_bytes(p.offsets, p.num_experts * 8);
    for (int64_t i = 0; i < choices; i++) {  // the others may not be read
        const char* matrix = static_cast<const char*>(p.weight) + element * p.offsets[p.experts[i]];
        announce(matrix, p.out_features, p.weight_row_stride, 1, 0, p.in_features, Use::read, element);
    }
    announce_bytes(p.scratch, p.scratch_bytes, Use::write);
    announce_result(p, (p.expert_weights ? p.tokens : choices) * p.out_features);
}

void announce_all(const SelectExpertsParams& p) {
    announce(p.logits, p.rows, p.logits_row_stride, 1, 0, p.num_experts);
    announce(p.bias, p.num_experts);
    announce(p.weights, p.rows * p.top_k, Use::write);
    announce(p.experts, p.rows * p.top_k, Use::write);
}

void announce_all(const EmbedTokensParams& p) {
    announce(p.tokens, p.batch, p.tokens_row_stride, 1, 0, p.window, Use::read, 8);
    const int64_t element = bytes_of(p.table_dtype);
    for (int64_t i = 0; i < p.batch * p.window; i++) {
        const int64_t token = p.tokens[i / p.window * p.tokens_row_stride + i % p.window];
        const char* row = static_cast<const char*>(p.table) + element * token * p.table_row_stride;
        announce(row, 1, 0, 1, 0, p.features, Use::read, element);
    }
    announce_result(p, p.batch * p.window * p.features);
}

void announce_all(const MlpActivationParams& p) {
    announce_activations(p, p.gate, p.rows, p.gate_row_stride, 1, 0, p.features);
    announce_activations(p, p.up, p.rows, p.up_row_stride, 1, 0, p.features);
    announce_result(p, p.rows * p.features);
}

void announce_all(const RmsNormParams& p) {
    announce_activations(p, p.x, p.rows, p.x_row_stride, 1, 0, p.features);
    announce_activations(p, p.gate, p.rows, p.gate_row_stride, 1, 0, p.features);
    announce(p.residual, p.rows * p.features);
    announce(p.weight, 1, 0, 1, 0, p.features, weights_of(p), bytes_of(p.weight_dtype));
    announce(p.residual_out, p.rows * p.features, Use::write);
    announce_result(p, p.rows * p.features);
}

void announce_all(const SkinnyLinearParams& p) {
    announce_activations(p, p.x, p.rows, p.x_row_stride, 1, 0, p.in_features);
    if (is_blocks(p.weight_dtype)) {
        announce_bytes(p.weight, (p.out_features + 15) / 16 * p.weight_row_stride, weights_of(p));
    } else {
        announce(p.weight, p.out_features, p.weight_row_stride, 1, 0, p.in_features, weights_of(p),
                 bytes_of(p.weight_dtype));
    }
    announce(p.bias, p.out_features, weights_of(p));
    announce(p.y, 1, 0, 1, 0, p.rows * p.out_features, Use::write, bytes_of(p.y_dtype));
}

void announce_all(const SelectiveScanParams& p) {
    for (const auto& [base, row, token] :
         {std::tuple(p.x, p.x_batch_stride, p.x_token_stride), std::tuple(p.dt, p.dt_batch_stride, p.dt_token_stride),
          std::tuple(p.z, p.z_batch_stride, p.z_token_stride)})
        announce_activations(p, base, p.batch, row, p.tokens, token, p.channels);
    announce_activations(p, p.B, p.batch, p.B_batch_stride, p.tokens, p.B_token_stride, p.b_groups * p.state_size);
    announce_activations(p, p.C, p.batch, p.C_batch_stride, p.tokens, p.C_token_stride, p.c_groups * p.state_size);
    announce(p.A, p.channels * p.state_size, weights_of(p));
    announce(p.D, p.channels, weights_of(p));
    announce(p.dt_bias, p.channels, weights_of(p));
    announce(p.start_slot, p.batch);
    announce(p.left_padding, p.batch);
    announce_result(p, p.batch * p.tokens * p.channels);
    announce_states(p, p.channels * p.state_size);
    announce_inputs(p, p.input_x, p.input_slots * p.channels);
    announce_inputs(p, p.input_dt, p.input_slots * p.channels);
    announce_inputs(p, p.input_B, p.input_slots * p.b_groups * p.state_size);
}

void announce_all(const SpeculativeAcceptParams& p) {
    announce(p.logits, p.batch, p.logits_batch_stride, p.tokens, p.logits_token_stride, p.vocabulary);
    announce(p.draft_probs, p.batch, p.draft_probs_batch_stride, p.tokens - 1, p.draft_probs_token_stride,
             p.vocabulary);
    announce_bytes(p.draft_tokens, p.batch * p.draft_stride * 8);
    const SamplingTensors& s = p.sampling;
    for (const float* value :
         {s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty})
        announce(value, p.batch);
    announce(s.top_k, p.batch);
    announce(s.bias_ids, p.batch * s.bias_capacity);
    announce(s.bias_values, p.batch * s.bias_capacity);
    announce_bytes(p.prompt_mask, p.batch * p.vocabulary);
    announce(p.output_counts, p.batch * p.vocabulary);
    announce_bytes(p.active, p.batch);
    announce_bytes(p.rng_keys, p.batch * 2 * 8);
    announce_bytes(p.positions, p.batch * 8);
    announce(p.num_draft_tokens, p.batch);
    announce_bytes(p.is_stop, p.batch * p.vocabulary);
    announce(p.target_probs, p.batch, p.target_probs_batch_stride, 1, 0, p.vocabulary, Use::write);
    announce_bytes(p.scratch, p.scratch_bytes, Use::write);
    announce_bytes(p.next_token, p.batch * 8, Use::write);
    announce(p.accepted, p.batch, Use::write);
    announce(p.row_status, p.batch, Use::write);
}

void announce_all(const CommitTokensParams& p) {
    announce_bytes(p.draft_tokens, p.batch * p.lookahead * 8);
    announce(p.accepted, p.batch);
    announce_bytes(p.next_token, p.batch * 8);
    announce(p.row_status, p.batch);
    announce(p.draft_status, p.lookahead * p.batch);
    announce(p.num_draft_tokens, p.batch);
    announce_bytes(p.is_stop, p.batch * p.vocabulary);
    announce_bytes(p.last, p.batch * 2 * 8, Use::write);
    announce_bytes(p.positions, p.batch * 8, Use::write);
    announce(p.remaining, p.batch, Use::write);
    announce_bytes(p.active, p.batch, Use::write);
    announce(p.slots, p.steps * p.batch, Use::write);
    announce(p.output_counts, p.batch * p.vocabulary, Use::write);
    announce_bytes(p.text, p.batch * p.capacity * 8, Use::write);
    announce_bytes(p.record, p.batch * (Record::tokens + p.lookahead + 1) * 8, Use::write);
}

void announce_all(const SsdParams& p) {
    const int64_t channels = p.heads * p.head_size, x_size = p.x_heads * p.head_size,
                  b_size = p.b_groups * p.state_size;
    announce_activations(p, p.x, p.batch, p.x_batch_stride, p.tokens, p.x_token_stride, x_size);
    announce_activations(p, p.dt, p.batch, p.dt_batch_stride, p.tokens, p.dt_token_stride, p.heads);
    announce_activations(p, p.z, p.batch, p.z_batch_stride, p.tokens, p.z_token_stride, channels);
    announce_activations(p, p.B, p.batch, p.B_batch_stride, p.tokens, p.B_token_stride, b_size);
    announce_activations(p, p.C, p.batch, p.C_batch_stride, p.tokens, p.C_token_stride, p.c_groups * p.state_size);
    announce(p.A, p.heads, weights_of(p));
    announce(p.D, p.d_per_channel ? channels : p.heads, weights_of(p));
    announce(p.dt_bias, p.heads, weights_of(p));
    announce(p.start_slot, p.batch);
    announce(p.left_padding, p.batch);
    announce_result(p, p.batch * p.tokens * channels);
    announce_states(p, channels * p.state_size);
    announce_inputs(p, p.input_x, p.input_slots * x_size);
    announce_inputs(p, p.input_dt, p.input_slots * p.heads);
    announce_inputs(p, p.input_B, p.input_slots * b_size);
}

}  // namespace

#define SM_ENTRY(op, Params)                   \
    [](const Params& p, cudaStream_t stream) { \
        shim::Machine::get().begin_call();     \
        announce_all(p);                       \
        cuda::op(p, stream);                   \
    },

const Kernels& kernels() {
    static const Kernels table = {"none", SM_FOR_EACH_OP(SM_ENTRY)};
    return table;
}

extern "C" __attribute__((visibility("default"))) void synchronize() { shim::Machine::get().synchronize(); }

}  // namespace speculative_mamba
