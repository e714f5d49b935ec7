// Python's view of a table of kernels: integers in, params struct, launcher. No logic.
//
// Included once per module, behind a header that gives Kernels, kernels(), Where and where_of(): the last argument of
// every function is the number of threads, or the stream.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "program.h"

namespace py = pybind11;
using namespace speculative_mamba;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline DType dtype(int code) { return static_cast<DType>(code); }

template <typename Params>
void submit(void (*Kernels::*kernel)(const Params&, Where), const Params& params, intptr_t where) {
    Program::submit([kernel, params](intptr_t place) { (kernels().*kernel)(params, where_of(place)); }, where);
}

using Pair = std::pair<int64_t, int64_t>;  // strides of (batch, token), of a cache of entries (batch, head)

void attention(int activations, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dims,
               int64_t slots, int64_t capacity, uintptr_t q, Pair q_strides, uintptr_t k, Pair k_strides, uintptr_t v,
               Pair v_strides, uintptr_t keys, Pair keys_strides, uintptr_t values, Pair values_strides,
               int cache_dtype, uintptr_t lengths, uintptr_t start_slot, uintptr_t null_columns, int64_t write_slot,
               bool keep_last, uintptr_t inv_freq, int64_t pairs, float scale, uintptr_t y, uintptr_t scratch,
               int64_t scratch_size, intptr_t where) {
    submit<AttentionParams>(&Kernels::attention,
                            {dtype(activations),
                             batch,
                             tokens,
                             heads,
                             kv_heads,
                             dims,
                             slots,
                             capacity,
                             pointer<float>(q),
                             q_strides.first,
                             q_strides.second,
                             pointer<float>(k),
                             k_strides.first,
                             k_strides.second,
                             pointer<float>(v),
                             v_strides.first,
                             v_strides.second,
                             pointer<void>(keys),
                             keys_strides.first,
                             keys_strides.second,
                             pointer<void>(values),
                             values_strides.first,
                             values_strides.second,
                             dtype(cache_dtype),
                             pointer<int32_t>(lengths),
                             pointer<int32_t>(start_slot),
                             pointer<int32_t>(null_columns),
                             write_slot,
                             keep_last,
                             pointer<float>(inv_freq),
                             pairs,
                             scale,
                             pointer<float>(y),
                             pointer<float>(scratch),
                             scratch_size},
                            where);
}

void causal_conv1d(int activations, int64_t batch, int64_t tokens, int64_t channels, int64_t width, int64_t repeat,
                   int64_t block, bool silu, uintptr_t x, Pair x_strides, uintptr_t weight, Pair weight_strides,
                   int weight_dtype, uintptr_t bias, uintptr_t window, Pair window_strides, uintptr_t start_slot,
                   uintptr_t null_columns, int64_t write_slot, bool keep_last, uintptr_t y, intptr_t where) {
    submit<CausalConv1dParams>(&Kernels::causal_conv1d,
                               {dtype(activations),
                                batch,
                                tokens,
                                channels,
                                width,
                                repeat,
                                block,
                                silu,
                                pointer<float>(x),
                                x_strides.first,
                                x_strides.second,
                                pointer<void>(weight),
                                weight_strides.first,
                                weight_strides.second,
                                dtype(weight_dtype),
                                pointer<float>(bias),
                                pointer<float>(window),
                                window_strides.first,
                                window_strides.second,
                                pointer<int32_t>(start_slot),
                                pointer<int32_t>(null_columns),
                                write_slot,
                                keep_last,
                                pointer<float>(y)},
                               where);
}

void selective_scan(int activations, int64_t batch, int64_t tokens, int64_t channels, int64_t state_size,
                    int64_t b_groups, int64_t c_groups, uintptr_t x, Pair x_strides, uintptr_t dt, Pair dt_strides,
                    uintptr_t A, uintptr_t B, Pair b_strides, uintptr_t C, Pair c_strides, uintptr_t D, uintptr_t z,
                    Pair z_strides, uintptr_t dt_bias, uintptr_t states, Pair states_strides, int state_dtype,
                    uintptr_t start_slot, uintptr_t null_columns, int64_t write_slot, bool keep_last,
                    int64_t input_slots, uintptr_t input_x, uintptr_t input_dt, uintptr_t input_B, uintptr_t y,
                    intptr_t where) {
    submit<SelectiveScanParams>(&Kernels::selective_scan,
                                {dtype(activations),
                                 batch,
                                 tokens,
                                 channels,
                                 state_size,
                                 b_groups,
                                 c_groups,
                                 pointer<float>(x),
                                 x_strides.first,
                                 x_strides.second,
                                 pointer<float>(dt),
                                 dt_strides.first,
                                 dt_strides.second,
                                 pointer<float>(A),
                                 pointer<float>(B),
                                 b_strides.first,
                                 b_strides.second,
                                 pointer<float>(C),
                                 c_strides.first,
                                 c_strides.second,
                                 pointer<float>(D),
                                 pointer<float>(z),
                                 z_strides.first,
                                 z_strides.second,
                                 pointer<float>(dt_bias),
                                 pointer<void>(states),
                                 states_strides.first,
                                 states_strides.second,
                                 dtype(state_dtype),
                                 pointer<int32_t>(start_slot),
                                 pointer<int32_t>(null_columns),
                                 write_slot,
                                 keep_last,
                                 input_slots,
                                 pointer<float>(input_x),
                                 pointer<float>(input_dt),
                                 pointer<float>(input_B),
                                 pointer<float>(y)},
                                where);
}

void ssd(int activations, int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t state_size,
         int64_t x_heads, int64_t b_groups, int64_t c_groups, uintptr_t x, Pair x_strides, uintptr_t dt,
         Pair dt_strides, uintptr_t A, uintptr_t B, Pair b_strides, uintptr_t C, Pair c_strides, uintptr_t D,
         bool d_per_channel, uintptr_t z, Pair z_strides, uintptr_t dt_bias, std::pair<float, float> dt_limit,
         uintptr_t states, Pair states_strides, int state_dtype, uintptr_t start_slot, uintptr_t null_columns,
         int64_t write_slot, bool keep_last, int64_t input_slots, uintptr_t input_x, uintptr_t input_dt,
         uintptr_t input_b, uintptr_t y, intptr_t where) {
    submit<SsdParams>(&Kernels::ssd,
                      {dtype(activations),
                       batch,
                       tokens,
                       heads,
                       head_size,
                       state_size,
                       x_heads,
                       b_groups,
                       c_groups,
                       pointer<float>(x),
                       x_strides.first,
                       x_strides.second,
                       pointer<float>(dt),
                       dt_strides.first,
                       dt_strides.second,
                       pointer<float>(A),
                       pointer<float>(B),
                       b_strides.first,
                       b_strides.second,
                       pointer<float>(C),
                       c_strides.first,
                       c_strides.second,
                       pointer<float>(D),
                       d_per_channel,
                       pointer<float>(z),
                       z_strides.first,
                       z_strides.second,
                       pointer<float>(dt_bias),
                       dt_limit.first,
                       dt_limit.second,
                       pointer<void>(states),
                       states_strides.first,
                       states_strides.second,
                       dtype(state_dtype),
                       pointer<int32_t>(start_slot),
                       pointer<int32_t>(null_columns),
                       write_slot,
                       keep_last,
                       input_slots,
                       pointer<float>(input_x),
                       pointer<float>(input_dt),
                       pointer<float>(input_b),
                       pointer<float>(y)},
                      where);
}

void skinny_linear(int activations, int y_dtype, int64_t rows, int64_t in_features, int64_t out_features, uintptr_t x,
                   int64_t x_row_stride, uintptr_t weight, int64_t weight_row_stride, int weight_dtype,
                   uintptr_t weight_scale, uintptr_t bias, uintptr_t y, intptr_t where) {
    submit<SkinnyLinearParams>(&Kernels::skinny_linear,
                               {dtype(activations), dtype(y_dtype), rows, in_features, out_features, pointer<float>(x),
                                x_row_stride, pointer<void>(weight), weight_row_stride, dtype(weight_dtype),
                                pointer<float>(weight_scale), pointer<float>(bias), pointer<float>(y)},
                               where);
}

void gated_silu(int activations, int64_t rows, int64_t features, uintptr_t gate, int64_t gate_row_stride, uintptr_t up,
                int64_t up_row_stride, uintptr_t y, intptr_t where) {
    submit<GatedSiluParams>(&Kernels::gated_silu,
                            {dtype(activations), rows, features, pointer<float>(gate), gate_row_stride,
                             pointer<float>(up), up_row_stride, pointer<float>(y)},
                            where);
}

void rms_norm(int activations, int64_t rows, int64_t features, int64_t groups, uintptr_t x, int64_t x_row_stride,
              uintptr_t residual, uintptr_t gate, int64_t gate_row_stride, uintptr_t weight, int weight_dtype,
              float eps, uintptr_t residual_out, uintptr_t y, intptr_t where) {
    submit<RmsNormParams>(&Kernels::rms_norm,
                          {dtype(activations), rows, features, groups, pointer<float>(x), x_row_stride,
                           pointer<float>(residual), pointer<float>(gate), gate_row_stride, pointer<void>(weight),
                           dtype(weight_dtype), eps, pointer<float>(residual_out), pointer<float>(y)},
                          where);
}

// Addresses of SamplingTensors, in the order of its fields.
using SamplingAddresses = std::array<uintptr_t, 9>;

SamplingTensors sampling_tensors(const SamplingAddresses& at, int64_t bias_capacity) {
    return {pointer<float>(at[0]), pointer<int32_t>(at[1]), pointer<float>(at[2]),   pointer<float>(at[3]),
            pointer<float>(at[4]), pointer<float>(at[5]),   pointer<float>(at[6]),   pointer<int32_t>(at[7]),
            pointer<float>(at[8]), bias_capacity};
}

void speculative_accept(int64_t batch, int64_t tokens, int64_t vocabulary, uintptr_t logits, Pair logits_strides,
                        uintptr_t draft_tokens, int64_t draft_stride, uintptr_t draft_probs, Pair draft_probs_strides,
                        const SamplingAddresses& sampling, int64_t bias_capacity, bool coupled, int purpose,
                        uintptr_t prompt_mask, uintptr_t output_counts, uintptr_t rng_keys, uintptr_t positions,
                        uintptr_t active, uintptr_t num_draft_tokens, uintptr_t target_probs,
                        int64_t target_probs_stride, uintptr_t accepted, uintptr_t next_token, uintptr_t row_status,
                        uintptr_t scratch, intptr_t where) {
    submit<SpeculativeAcceptParams>(&Kernels::speculative_accept,
                                    {batch,
                                     tokens,
                                     vocabulary,
                                     pointer<float>(logits),
                                     logits_strides.first,
                                     logits_strides.second,
                                     pointer<int64_t>(draft_tokens),
                                     draft_stride,
                                     pointer<float>(draft_probs),
                                     draft_probs_strides.first,
                                     draft_probs_strides.second,
                                     sampling_tensors(sampling, bias_capacity),
                                     coupled,
                                     purpose,
                                     pointer<bool>(prompt_mask),
                                     pointer<int32_t>(output_counts),
                                     pointer<int64_t>(rng_keys),
                                     pointer<int64_t>(positions),
                                     pointer<bool>(active),
                                     pointer<int32_t>(num_draft_tokens),
                                     pointer<float>(target_probs),
                                     target_probs_stride,
                                     pointer<int32_t>(accepted),
                                     pointer<int64_t>(next_token),
                                     pointer<int32_t>(row_status),
                                     pointer<uint64_t>(scratch)},
                                    where);
}

void commit_tokens(int64_t batch, int64_t lookahead, int64_t vocabulary, int64_t steps, int64_t capacity,
                   uintptr_t drafted, uintptr_t accepted, uintptr_t following, uintptr_t verdicts, uintptr_t limits,
                   uintptr_t is_stop, uintptr_t last, uintptr_t positions, uintptr_t room, uintptr_t active,
                   uintptr_t slots, uintptr_t output_counts, uintptr_t text, uintptr_t record, intptr_t where) {
    submit<CommitTokensParams>(
        &Kernels::commit_tokens,
        {batch, lookahead, vocabulary, steps, capacity, pointer<int64_t>(drafted), pointer<int32_t>(accepted),
         pointer<int64_t>(following), pointer<int32_t>(verdicts), pointer<int32_t>(limits), pointer<bool>(is_stop),
         pointer<int64_t>(last), pointer<int64_t>(positions), pointer<int32_t>(room), pointer<bool>(active),
         pointer<int32_t>(slots), pointer<int32_t>(output_counts), pointer<int64_t>(text), pointer<int64_t>(record)},
        where);
}

// The functions of all ops, and Program.
inline void define_ops(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("attention", &attention, release());
    m.def("causal_conv1d", &causal_conv1d, release());
    m.def("selective_scan", &selective_scan, release());
    m.def("ssd", &ssd, release());
    m.def("skinny_linear", &skinny_linear, release());
    m.def("rms_norm", &rms_norm, release());
    m.def("gated_silu", &gated_silu, release());
    m.def("speculative_accept", &speculative_accept, release());
    m.def("commit_tokens", &commit_tokens, release());
    py::class_<Program>(m, "Program", py::module_local(), "A recorded sequence of kernel calls.")
        .def(py::init<>())
        .def("run", &Program::run, release())
        .def_static("record", &Program::record, py::arg("program").none(true));
    m.doc() = "Pointers are integers, strides are in elements, dtype codes: 0 float32, 1 bfloat16, 2 float16, 3 int8.";
}

}  // namespace
