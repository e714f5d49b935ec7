// The table of kernels that the bindings call, filled with CUDA kernels that run on the CPU. Before each, the memory
// that its arguments describe is announced, row by row: whatever lies between is out of bounds.
#include "../../../csrc/cpu/kernels.h"

#include "../../../csrc/dtype.h"
#include "cuda_runtime.h"

namespace speculative_mamba {

namespace cuda {
void attention(const AttentionParams&, DType activations, cudaStream_t);
void causal_conv1d(const CausalConv1dParams&, DType activations, cudaStream_t);
void gated_silu(const GatedSiluParams&, DType activations, cudaStream_t);
void rms_norm(const RmsNormParams&, DType activations, cudaStream_t);
void sample_tokens(const SampleTokensParams&, cudaStream_t);
void selective_scan(const SelectiveScanParams&, DType activations, cudaStream_t);
void skinny_linear(const SkinnyLinearParams&, DType activations, cudaStream_t);
void speculative_accept(const SpeculativeAcceptParams&, cudaStream_t);
void ssd(const SsdParams&, DType activations, cudaStream_t);
}  // namespace cuda

namespace {

int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::int8 ? 1 : 2; }

// Memory of `rows` × `columns` runs of `size` elements each.
void announce(const void* base, int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride, int64_t size,
              bool writable = false, int64_t element = 4) {
    if (!base) return;
    auto& memory = shim::Machine::get().memory;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            auto& range = memory[reinterpret_cast<uintptr_t>(base) + element * (r * row_stride + c * column_stride)];
            range.bytes = std::max(range.bytes, static_cast<size_t>(size * element));
            range.writable = range.writable || writable;
        }
}

void announce(const void* base, int64_t size, bool writable = false) { announce(base, 1, 0, 1, 0, size, writable); }

void announce_bytes(const void* base, int64_t bytes, bool writable = false) {
    announce(base, 1, 0, 1, 0, bytes, writable, 1);
}

// Of each row the slot it starts from, and those it may write.
template <typename Params>
void announce_states(const Params& p, int64_t size) {
    for (int64_t row = 0; row < p.batch; row++) {
        auto slot = [&](int64_t number, bool writable) {
            const int64_t element = bytes_of(p.state_dtype);
            const int64_t offset = row * p.states_batch_stride + number * p.states_slot_stride;
            announce(static_cast<char*>(p.states) + element * offset, 1, 0, 1, 0, size, writable, element);
        };
        slot(p.input_dt ? 0 : p.start_slot[row], p.input_dt && (p.keep_last || p.write_slot == 0));
        if (p.keep_last) slot(0, true);
        if (!p.keep_last && !p.input_dt)
            for (int64_t t = 0; t < p.tokens; t++) slot(p.write_slot + t, true);
    }
}

// Of each row the entries before the window, and those of the window.
void announce_entries(const AttentionParams& p, void* base, int64_t batch_stride, int64_t head_stride) {
    const int64_t element = bytes_of(p.cache_dtype);
    for (int64_t row = 0; row < p.batch; row++) {
        const int64_t length = p.lengths[row * p.slots + p.start_slot[row]];
        const int64_t nulls = p.null_columns ? std::min<int64_t>(p.null_columns[row], p.tokens) : 0;
        auto entries = [&](int64_t first, int64_t count, bool writable) {
            char* at = static_cast<char*>(base) + element * (row * batch_stride + first * p.dims);
            announce(at, 1, 0, p.kv_heads, head_stride, count * p.dims, writable, element);
        };
        entries(0, length, false);
        entries(length, p.tokens - nulls, true);
    }
}

void attention(const AttentionParams& given, int) {
    AttentionParams p = given;
    for (int64_t row = 0; row < p.batch; row++)
        p.capacity = std::max<int64_t>(p.capacity, p.lengths[row * p.slots + p.start_slot[row]] + p.tokens);
    const int64_t chunks = (p.capacity + 255) / 256;
    const int64_t size =
        p.batch * (p.tokens * p.heads * p.dims + std::min<int64_t>(p.tokens, 64) * p.heads * chunks * (p.dims + 2) + 1);
    std::vector<float> scratch(size, std::nanf(""));
    p.scratch = scratch.data();
    shim::Machine::get().memory.clear();
    announce(p.q, p.batch, p.q_batch_stride, p.tokens, p.q_token_stride, p.heads * p.dims);
    announce(p.k, p.batch, p.k_batch_stride, p.tokens, p.k_token_stride, p.kv_heads * p.dims);
    announce(p.v, p.batch, p.v_batch_stride, p.tokens, p.v_token_stride, p.kv_heads * p.dims);
    announce_entries(p, p.keys, p.keys_batch_stride, p.keys_head_stride);
    announce_entries(p, p.values, p.values_batch_stride, p.values_head_stride);
    for (int64_t row = 0; row < p.batch; row++) {
        int32_t* lengths = p.lengths + row * p.slots;
        announce(lengths + p.start_slot[row], 1);
        announce(lengths + p.write_slot, 1, 1, p.keep_last ? 1 : p.tokens, 1, 1, true);
    }
    announce(p.start_slot, p.batch);
    announce(p.null_columns, p.batch);
    announce(p.inv_freq, p.pairs);
    announce(p.scratch, size, true);
    announce(p.y, p.batch * p.tokens * p.heads * p.dims, true);
    cuda::attention(p, DType::float32, nullptr);
}

void causal_conv1d(const CausalConv1dParams& p, int) {
    shim::Machine::get().memory.clear();
    announce(p.x, p.batch, p.x_batch_stride, p.tokens, p.x_token_stride, p.channels / p.repeat);
    const int64_t element = bytes_of(p.weight_dtype);
    announce(p.weight, p.channels, p.weight_channel_stride, p.width, p.weight_tap_stride, 1, false, element);
    announce(p.bias, p.channels);
    announce(p.start_slot, p.batch);
    announce(p.null_columns, p.batch);
    announce(p.y, p.batch * p.tokens * p.channels, true);
    const int64_t history = p.width - 1;
    for (int64_t row = 0; row < p.batch; row++) {
        float* window = p.window + row * p.window_batch_stride;
        auto rows = [&](int64_t first, int64_t count, bool writable) {
            announce(window + first * p.window_row_stride, count, p.window_row_stride, 1, 0, p.channels, writable);
        };
        rows(p.start_slot[row] + 1, history, false);
        if (p.keep_last) rows(1, history, true);
        if (!p.keep_last && p.write_slot == 0) rows(0, history, true);
        if (!p.keep_last) rows(history + p.write_slot, p.tokens, true);
    }
    cuda::causal_conv1d(p, DType::float32, nullptr);
}

void gated_silu(const GatedSiluParams& p, int) {
    shim::Machine::get().memory.clear();
    announce(p.gate, p.rows, p.gate_row_stride, 1, 0, p.features);
    announce(p.up, p.rows, p.up_row_stride, 1, 0, p.features);
    announce(p.y, p.rows * p.features, true);
    cuda::gated_silu(p, DType::float32, nullptr);
}

void rms_norm(const RmsNormParams& p, int) {
    shim::Machine::get().memory.clear();
    announce(p.x, p.rows, p.x_row_stride, 1, 0, p.features);
    announce(p.gate, p.rows, p.gate_row_stride, 1, 0, p.features);
    announce(p.residual, p.rows * p.features);
    announce(p.weight, 1, 0, 1, 0, p.features, false, bytes_of(p.weight_dtype));
    announce(p.residual_out, p.rows * p.features, true);
    announce(p.y, p.rows * p.features, true);
    cuda::rms_norm(p, DType::float32, nullptr);
}

void skinny_linear(const SkinnyLinearParams& p, int) {
    shim::Machine::get().memory.clear();
    announce(p.x, p.rows, p.x_row_stride, 1, 0, p.in_features);
    const int64_t element = bytes_of(p.weight_dtype);
    announce(p.weight, p.out_features, p.weight_row_stride, 1, 0, p.in_features, false, element);
    announce(p.weight_scale, p.out_features);
    announce(p.bias, p.out_features);
    announce(p.y, p.rows * p.out_features, true);
    cuda::skinny_linear(p, DType::float32, nullptr);
}

void selective_scan(const SelectiveScanParams& p, int) {
    shim::Machine::get().memory.clear();
    for (const auto& [base, row, token] :
         {std::tuple(p.x, p.x_batch_stride, p.x_token_stride), std::tuple(p.dt, p.dt_batch_stride, p.dt_token_stride),
          std::tuple(p.z, p.z_batch_stride, p.z_token_stride)})
        announce(base, p.batch, row, p.tokens, token, p.channels);
    announce(p.B, p.batch, p.b_batch_stride, p.tokens, p.b_token_stride, p.b_groups * p.state_size);
    announce(p.C, p.batch, p.c_batch_stride, p.tokens, p.c_token_stride, p.c_groups * p.state_size);
    announce(p.A, p.channels * p.state_size);
    announce(p.D, p.channels);
    announce(p.dt_bias, p.channels);
    announce(p.start_slot, p.batch);
    announce(p.null_columns, p.batch);
    announce(p.y, p.batch * p.tokens * p.channels, true);
    announce_states(p, p.channels * p.state_size);
    if (p.input_dt) {
        const int64_t rows = p.batch * p.input_slots;
        announce(p.input_x, rows * p.channels, true);
        announce(p.input_dt, rows * p.channels, true);
        announce(p.input_B, rows * p.b_groups * p.state_size, true);
    }
    cuda::selective_scan(p, DType::float32, nullptr);
}

void sample_tokens(const SampleTokensParams& p, int) {
    shim::Machine::get().memory.clear();
    announce(p.logits, p.batch, p.logits_batch_stride, 1, 0, p.vocabulary);
    announce(p.laws, p.batch, p.laws_batch_stride, 1, 0, p.vocabulary, true);
    announce_bytes(p.seen, p.batch * p.vocabulary);
    announce_bytes(p.active, p.batch);
    announce_bytes(p.recent, p.batch * p.recent_tokens * 8);
    announce_bytes(p.keys, p.batch * 2 * 8);
    announce_bytes(p.positions, p.batch * 8);
    announce_bytes(p.tokens, p.batch * 8, true);
    announce(p.verdicts, p.batch, true);
    cuda::sample_tokens(p, nullptr);
}

void speculative_accept(const SpeculativeAcceptParams& given, int) {
    SpeculativeAcceptParams p = given;
    std::vector<int64_t> decisions(p.batch * p.tokens);
    p.decisions = decisions.data();
    shim::Machine::get().memory.clear();
    announce(p.logits, p.batch, p.logits_batch_stride, p.tokens, p.logits_token_stride, p.vocabulary);
    announce(p.laws, p.batch, p.laws_batch_stride, p.tokens - 1, p.laws_token_stride, p.vocabulary);
    announce_bytes(p.drafted, p.batch * (p.tokens - 1) * 8);
    announce_bytes(p.seen, p.batch * p.vocabulary);
    announce_bytes(p.active, p.batch);
    announce_bytes(p.keys, p.batch * 2 * 8);
    announce_bytes(p.positions, p.batch * 8);
    announce_bytes(p.decisions, p.batch * p.tokens * 8, true);
    announce_bytes(p.next, p.batch * 8, true);
    announce(p.accepted, p.batch, true);
    announce(p.verdicts, p.batch, true);
    cuda::speculative_accept(p, nullptr);
}

void ssd(const SsdParams& p, int) {
    shim::Machine::get().memory.clear();
    const int64_t channels = p.heads * p.head_size, x_size = p.x_heads * p.head_size,
                  b_size = p.b_groups * p.state_size;
    announce(p.x, p.batch, p.x_batch_stride, p.tokens, p.x_token_stride, x_size);
    announce(p.dt, p.batch, p.dt_batch_stride, p.tokens, p.dt_token_stride, p.heads);
    announce(p.z, p.batch, p.z_batch_stride, p.tokens, p.z_token_stride, channels);
    announce(p.B, p.batch, p.b_batch_stride, p.tokens, p.b_token_stride, b_size);
    announce(p.C, p.batch, p.c_batch_stride, p.tokens, p.c_token_stride, p.c_groups * p.state_size);
    announce(p.A, p.heads);
    announce(p.D, p.d_per_channel ? channels : p.heads);
    announce(p.dt_bias, p.heads);
    announce(p.start_slot, p.batch);
    announce(p.null_columns, p.batch);
    announce(p.y, p.batch * p.tokens * channels, true);
    announce_states(p, channels * p.state_size);
    if (p.input_dt) {
        const int64_t rows = p.batch * p.input_slots;
        announce(p.input_x, rows * x_size, true);
        announce(p.input_dt, rows * p.heads, true);
        announce(p.input_b, rows * b_size, true);
    }
    cuda::ssd(p, DType::float32, nullptr);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels table = [] {
        Kernels made{};
        made.isa = "cuda";
        made.attention = attention;
        made.causal_conv1d = causal_conv1d;
        made.gated_silu = gated_silu;
        made.rms_norm = rms_norm;
        made.sample_tokens = sample_tokens;
        made.selective_scan = selective_scan;
        made.skinny_linear = skinny_linear;
        made.speculative_accept = speculative_accept;
        made.ssd = ssd;
        return made;
    }();
    return table;
}

std::vector<std::string> available_isas() { return {"cuda"}; }
void select_isa(const std::string&) {}
void throw_unknown_dtype(DType dtype) {
    throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace speculative_mamba
