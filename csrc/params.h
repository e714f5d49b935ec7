// One plain struct per op: pointers, sizes, strides in elements. No framework types, no ownership.
//
// Activations are float32 on the CPU. On a GPU they are of dtype `activations`, whatever their pointers' type says.
//
// Fields have the names of the op's arguments, in their order, after the sizes. Python fills them by name, as
// define_ops.h says: after a tensor's pointer come its strides (`<tensor>_…_stride`, of its first dimensions) and its
// dtype (`<tensor>_dtype`). Memory that a kernel needs beside (`scratch`, `scratch_bytes`) comes last.
#pragma once

#include <cstdint>

// Ends a struct: names all its fields, in order.
#define SM_FIELDS(...)                                   \
    static constexpr const char* kFields = #__VA_ARGS__; \
    template <typename Visitor>                          \
    void visit(const Visitor& visitor) {                 \
        visitor(__VA_ARGS__);                            \
    }

namespace speculative_mamba {

// The last four are formats of blocks, for skinny_linear's weight only; ops/block_formats.py describes them.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, q8_0 = 3, q4_0 = 4, q4_k = 5, q6_k = 6 };
constexpr const char* kDTypes[] = {"float32", "bfloat16", "float16", "q8_0", "q4_0", "q4_k", "q6_k"};
inline bool is_blocks(DType dtype) { return dtype >= DType::q8_0; }

constexpr int kMaxConvWidth = 8;
constexpr double kRounding = 1e-6;  // bounds of filters are met up to the rounding of float32

// y = causal depthwise convolution of x, or silu of it, with gates on what goes in and what comes out; the inputs are
// kept in `window` so that a later call can start after any of them. Channel d convolves channel
// d / (block·repeat) · block + d % block of x · input_gate.
struct CausalConv1dParams {
    DType activations;  // of x, gates and y
    int64_t batch, tokens, channels, width;
    int64_t repeat, block;  // block·repeat divides D
    const float* x;         // (B, T, D / repeat), channels contiguous
    int64_t x_batch_stride, x_token_stride;
    const void* weight;  // (D, W)
    int64_t weight_channel_stride, weight_tap_stride;
    DType weight_dtype;
    const float* bias;  // (D), may be null
    float* window;      // (B, W-1+S, D): row W-1+j is the input of slot j
    int64_t window_batch_stride, window_row_stride;
    const int32_t* start_slot;  // (B); -1: nothing of the row is read or written, y is 0
    int64_t write_slot;         // slot of the first token
    const float* input_gate;    // as x, may be null
    int64_t input_gate_batch_stride, input_gate_token_stride;
    const float* output_gate;  // (B, T, D), channels contiguous, may be null: multiplies y
    int64_t output_gate_batch_stride, output_gate_token_stride;
    bool silu;
    const int32_t* left_padding;  // (B), may be null: leading tokens of a row whose input counts as 0
    bool final_state_only;        // prefill: only the last token's slot is kept, as slot 0
    bool constant_weights;        // no kernel before writes weight or bias
    float* y;                     // (B, T, D) contiguous

    SM_FIELDS(activations, batch, tokens, channels, width, repeat, block, x, x_batch_stride, x_token_stride, weight,
              weight_channel_stride, weight_tap_stride, weight_dtype, bias, window, window_batch_stride,
              window_row_stride, start_slot, write_slot, input_gate, input_gate_batch_stride, input_gate_token_stride,
              output_gate, output_gate_batch_stride, output_gate_token_stride, silu, left_padding, final_state_only,
              constant_weights, y)
};

// Mamba-1 selective scan of T tokens per row, with the state after every token rounded to its dtype and written to its
// slot. With inputs there is one state, and in place of the others the inputs that lead from it to them.
struct SelectiveScanParams {
    DType activations;  // of x, dt, B, C, z and y
    int64_t batch, tokens, channels, state_size;
    int64_t b_groups, c_groups;  // Gb, Gc divide D: channel d uses group d·G / D
    const float* x;              // (B, T, D), channels contiguous
    int64_t x_batch_stride, x_token_stride;
    const float* dt;  // (B, T, D) before bias and softplus
    int64_t dt_batch_stride, dt_token_stride;
    const float* A;  // (D, N) contiguous
    const float* B;  // (B, T, Gb, N), (Gb, N) contiguous
    int64_t B_batch_stride, B_token_stride;
    const float* C;  // (B, T, Gc, N), (Gc, N) contiguous
    int64_t C_batch_stride, C_token_stride;
    const float* D;  // (D)
    const float* z;  // (B, T, D), may be null
    int64_t z_batch_stride, z_token_stride;
    const float* dt_bias;  // (D)
    void* states;          // (B, S, D, N), or with inputs (B, 1, D, N); (D, N) contiguous
    int64_t states_batch_stride, states_slot_stride;
    DType states_dtype;
    const int32_t* start_slot;  // (B); -1: nothing of the row is read or written, y is 0
    int64_t write_slot;
    int64_t input_slots;          // S where there are inputs
    float* input_x;               // (B, S, D) contiguous; null, like the next two, where every slot has its state
    float* input_dt;              // (B, S, D) contiguous; after bias and softplus, 0: this input counts as nothing
    float* input_B;               // (B, S, Gb, N) contiguous
    const int32_t* left_padding;  // (B), may be null: leading tokens of a row that leave the state alone
    bool final_state_only;        // prefill: only the last state is written, to slot 0
    bool constant_weights;        // no kernel before writes A, D or dt_bias
    float* y;                     // (B, T, D) contiguous

    SM_FIELDS(activations, batch, tokens, channels, state_size, b_groups, c_groups, x, x_batch_stride, x_token_stride,
              dt, dt_batch_stride, dt_token_stride, A, B, B_batch_stride, B_token_stride, C, C_batch_stride,
              C_token_stride, D, z, z_batch_stride, z_token_stride, dt_bias, states, states_batch_stride,
              states_slot_stride, states_dtype, start_slot, write_slot, input_slots, input_x, input_dt, input_B,
              left_padding, final_state_only, constant_weights, y)
};

// Mamba-2 scan of T tokens per row: one A and one step size for a whole head of P channels with N states each. X heads
// of x, Gb groups of B and Gc of C each serve as many neighbouring heads. The state after every token is rounded to its
// dtype and written to its slot, or, with `input_dt`, the inputs are kept from which the next call computes it again.
struct SsdParams {
    DType activations;  // of x, dt, B, C, z and y
    int64_t batch, tokens, heads, head_size, state_size;
    int64_t x_heads, b_groups, c_groups;
    const float* x;  // (B, T, X, P), (X, P) contiguous
    int64_t x_batch_stride, x_token_stride;
    const float* dt;  // (B, T, H) before bias and softplus
    int64_t dt_batch_stride, dt_token_stride;
    const float* A;  // (H)
    const float* B;  // (B, T, Gb, N), (Gb, N) contiguous
    int64_t B_batch_stride, B_token_stride;
    const float* C;  // (B, T, Gc, N), (Gc, N) contiguous
    int64_t C_batch_stride, C_token_stride;
    const float* D;  // (H), or (H, P) contiguous
    bool d_per_channel;
    const float* dt_bias;  // (H)
    void* states;          // (B, S, H, P, N), (H, P, N) contiguous; one slot where inputs are kept
    int64_t states_batch_stride, states_slot_stride;
    DType states_dtype;
    const int32_t* start_slot;  // (B); -1: nothing of the row is read or written, y is 0
    int64_t write_slot;
    const float* z;  // (B, T, H, P), (H, P) contiguous, may be null
    int64_t z_batch_stride, z_token_stride;
    float dt_min, dt_max;
    int64_t input_slots;
    float* input_x;               // (B, S, X, P) contiguous
    float* input_dt;              // (B, S, H) contiguous, after everything; null: a state per slot
    float* input_B;               // (B, S, Gb, N) contiguous
    const int32_t* left_padding;  // (B), may be null: leading tokens of a row that leave the state alone
    bool final_state_only;        // prefill: only the last state is written, to slot 0
    bool constant_weights;        // no kernel before writes A, D or dt_bias
    float* y;                     // (B, T, H, P) contiguous

    SM_FIELDS(activations, batch, tokens, heads, head_size, state_size, x_heads, b_groups, c_groups, x, x_batch_stride,
              x_token_stride, dt, dt_batch_stride, dt_token_stride, A, B, B_batch_stride, B_token_stride, C,
              C_batch_stride, C_token_stride, D, d_per_channel, dt_bias, states, states_batch_stride,
              states_slot_stride, states_dtype, start_slot, write_slot, z, z_batch_stride, z_token_stride, dt_min,
              dt_max, input_slots, input_x, input_dt, input_B, left_padding, final_state_only, constant_weights, y)
};

// Causal grouped-query attention of T tokens per row over a cache of rotated keys and of values, of which a slot holds
// the length.
struct AttentionParams {
    DType activations;                                              // of q, k, v and y
    int64_t batch, tokens, heads, kv_heads, dims, slots, capacity;  // query head h reads kv head h · kv_heads / heads
    const float* q;                                                 // (B, T, H, P), heads contiguous
    int64_t q_batch_stride, q_token_stride;
    const float* k;  // (B, T, G, P), heads contiguous
    int64_t k_batch_stride, k_token_stride;
    const float* v;  // (B, T, G, P), heads contiguous
    int64_t v_batch_stride, v_token_stride;
    void* keys;  // (B, G, L, P), entries contiguous
    int64_t keys_batch_stride, keys_head_stride;
    DType keys_dtype;  // of values too
    void* values;      // (B, G, L, P), entries contiguous
    int64_t values_batch_stride, values_head_stride;
    int32_t* lengths;           // (B, S) contiguous: entries of each slot's state
    const int32_t* start_slot;  // (B); -1: nothing of the row is read or written, y is 0
    int64_t write_slot;
    const float* inv_freq;  // (R): radians per position; may be null with R = 0
    int64_t pairs;          // R: dimensions i and i+R are rotated together
    float scale;
    const int32_t* left_padding;  // (B), may be null: leading tokens of a row that take no entry
    bool final_state_only;        // prefill: only the last length is written, to slot 0
    float* y;                     // (B, T, H, P) contiguous
    float* scratch;
    int64_t scratch_bytes;

    SM_FIELDS(activations, batch, tokens, heads, kv_heads, dims, slots, capacity, q, q_batch_stride, q_token_stride, k,
              k_batch_stride, k_token_stride, v, v_batch_stride, v_token_stride, keys, keys_batch_stride,
              keys_head_stride, keys_dtype, values, values_batch_stride, values_head_stride, lengths, start_slot,
              write_slot, inv_freq, pairs, scale, left_padding, final_state_only, y, scratch, scratch_bytes)
};

// y = y_scale · x Wᵀ + bias for few rows; row m of y does not depend on M.
struct SkinnyLinearParams {
    DType activations;  // of x
    int64_t rows, in_features, out_features;
    const float* x;  // (M, K), features contiguous
    int64_t x_row_stride;
    const void* weight;         // (N, K), features contiguous; or groups of sixteen rows in blocks
    int64_t weight_row_stride;  // or bytes of a group
    DType weight_dtype;
    const float* bias;  // (N), may be null
    float y_scale;
    bool constant_weights;  // no kernel before writes weight or bias
    float* y;               // (M, N) contiguous
    DType y_dtype;

    SM_FIELDS(activations, rows, in_features, out_features, x, x_row_stride, weight, weight_row_stride, weight_dtype,
              bias, y_scale, constant_weights, y, y_dtype)
};

// Of each token the top_k experts, by score plus bias, out of the best groups of neighbours; weights are their scores,
// which may be divided by their sum.
enum ExpertScore { kSoftmax, kSigmoid };  // in the order of ops/select_experts
struct SelectExpertsParams {
    int64_t rows, num_experts;
    const float* logits;  // (M, E), experts contiguous
    int64_t logits_row_stride;
    const float* bias;  // (E), may be null
    int64_t top_k;
    int score;
    int64_t groups, top_k_groups;  // G divides E
    bool normalize;
    float epsilon;     // added to the sum
    float scale;       // of the weights
    float* weights;    // (M, k) contiguous
    int32_t* experts;  // (M, k) contiguous

    SM_FIELDS(rows, num_experts, logits, logits_row_stride, bias, top_k, score, groups, top_k_groups, normalize,
              epsilon, scale, weights, experts)
};
constexpr int kMaxExperts = 1024;

// y[m, j] = W of expert experts[m, j] · x[m, j], or with expert_weights y[m] = their weighted sum over j. J of x is k,
// or 1: the same for all. The matrix of expert e begins `offsets[e]` elements behind `weight`.
struct ExpertLinearParams {
    DType activations;                                                      // of x and y
    int64_t tokens, top_k, inputs, num_experts, in_features, out_features;  // inputs = J
    const float* x;                                                         // (M, J, K), features contiguous
    int64_t x_token_stride, x_input_stride;
    const int32_t* experts;       // (M, k) contiguous
    const float* expert_weights;  // (M, k) contiguous, may be null
    const void* weight;           // (N, K) of the first expert, features contiguous
    int64_t weight_row_stride;    // the same for all
    DType weight_dtype;
    const int64_t* offsets;  // (E) contiguous
    float* y;                // (M, k, N) contiguous, or with expert_weights (M, 1, N)
    float* scratch;          // on a GPU with expert_weights: (M, k, N), the summands
    int64_t scratch_bytes;

    SM_FIELDS(activations, tokens, top_k, inputs, num_experts, in_features, out_features, x, x_token_stride,
              x_input_stride, experts, expert_weights, weight, weight_row_stride, weight_dtype, offsets, y, scratch,
              scratch_bytes)
};

// y = table[tokens], converted
struct EmbedTokensParams {
    int64_t batch, window, features;
    const int64_t* tokens;  // (B, T), contiguous in T
    int64_t tokens_row_stride;
    const void* table;  // (V, D), features contiguous
    DType table_dtype;
    int64_t table_row_stride;
    DType activations;  // of y
    float* y;           // (B·T, D) contiguous

    SM_FIELDS(batch, window, features, tokens, tokens_row_stride, table, table_dtype, table_row_stride, activations, y)
};

enum MlpActivation { kSilu, kRelu2 };  // in the order of ops/mlp_activation

// y = act(gate) · up, or act(gate)
struct MlpActivationParams {
    DType activations;  // of gate, up and y
    int64_t rows, features;
    const float* gate;  // (M, I), features contiguous
    int64_t gate_row_stride;
    const float* up;  // (M, I), features contiguous, may be null
    int64_t up_row_stride;
    int activation;
    float* y;  // (M, I) contiguous

    SM_FIELDS(activations, rows, features, gate, gate_row_stride, up, up_row_stride, activation, y)
};

// residual_out = x_scale · x + residual, or x_scale · x · silu(gate); y = residual_out / sqrt(mean(residual_out²) +
// eps) · weight, with a mean for each of `groups` equal parts of the features.
struct RmsNormParams {
    DType activations;  // of x, gate and y; the residual stream is float32
    int64_t rows, features, groups;
    const float* x;  // (M, D), features contiguous
    int64_t x_row_stride;
    const void* weight;  // (D)
    DType weight_dtype;
    const float* residual;  // (M, D) contiguous, may be null
    const float* gate;      // (M, D), features contiguous, may be null
    int64_t gate_row_stride;
    float eps;
    float x_scale;
    bool constant_weights;  // no kernel before writes weight
    float* y;               // (M, D) contiguous
    float* residual_out;    // (M, D) contiguous

    SM_FIELDS(activations, rows, features, groups, x, x_row_stride, weight, weight_dtype, residual, gate,
              gate_row_stride, eps, x_scale, constant_weights, y, residual_out)
};

// How tokens are chosen, one value per row; see ops/sampling_tensors.py.
struct SamplingTensors {
    const float* temperature;         // (B); 0: greedy
    const int32_t* top_k;             // (B); 0: all tokens
    const float* top_p;               // (B); 1: all tokens
    const float* min_p;               // (B); 0: all tokens
    const float* repetition_penalty;  // (B); null, like the next two: no row has a penalty
    const float* presence_penalty;    // (B)
    const float* frequency_penalty;   // (B)
    const int32_t* bias_ids;          // (B, N); -1 behind the last
    const float* bias_values;         // (B, N)
    int64_t bias_capacity;            // N
};

// What came of a row's logits.
enum class RowStatus : int32_t {
    ok = 0,
    nan_logits = 1,
    infinite_logits = 2,
    no_token = 3,         // every logit is -inf
    bad_draft_probs = 4,  // the draft's probabilities give its own token none
    bad_residual = 5,     // max(p - q, 0) is empty or not finite
};

// How many of a row's K drafted tokens stand, and the token after them. With K = 0 a token is sampled.
struct SpeculativeAcceptParams {
    int64_t batch, tokens, vocabulary;  // tokens = K+1
    const float* logits;                // (B, K+1, V), tokens of the vocabulary contiguous
    int64_t logits_batch_stride, logits_token_stride;
    const int64_t* draft_tokens;  // (B, R): the last K are tested, those before are text that is not yet counted
    int64_t draft_stride;         // R
    const float* draft_probs;     // (B, K, V), may be null: each drafted token was certain
    int64_t draft_probs_batch_stride, draft_probs_token_stride;
    SamplingTensors sampling;
    const int64_t* rng_keys;   // (B, 2): seed, stream
    const int64_t* positions;  // (B): of the first token that is chosen
    int purpose;               // of the noise that tokens are drawn with
    bool coupled;
    const bool* prompt_mask;          // (B, V): tokens of the prompt; read only with a penalty, like the next
    const int32_t* output_counts;     // (B, V): how often each token was generated, before the drafted ones
    const bool* active;               // (B), may be null: rows to decide
    const int32_t* num_draft_tokens;  // (B), may be null: only that many drafted tokens of a row count, at least 0
    const bool* is_stop;              // (B, V), may be null: tokens that end each text; nothing is decided behind one
    float* target_probs;              // (B, V), may be null: with K = 0, what each token was drawn from
    int64_t target_probs_batch_stride;
    int32_t* accepted;    // (B); the position, where the status is not ok
    int64_t* next_token;  // (B)
    int32_t* row_status;  // (B)
    uint64_t* scratch;    // laid out in cuda/logits.cuh
    int64_t scratch_bytes;

    SM_FIELDS(batch, tokens, vocabulary, logits, logits_batch_stride, logits_token_stride, draft_tokens, draft_stride,
              draft_probs, draft_probs_batch_stride, draft_probs_token_stride, sampling.temperature, sampling.top_k,
              sampling.top_p, sampling.min_p, sampling.repetition_penalty, sampling.presence_penalty,
              sampling.frequency_penalty, sampling.bias_ids, sampling.bias_values, sampling.bias_capacity, rng_keys,
              positions, purpose, coupled, prompt_mask, output_counts, active, num_draft_tokens, is_stop, target_probs,
              target_probs_batch_stride, accepted, next_token, row_status, scratch, scratch_bytes)
};

// Columns of a record of commit_tokens, the last of which is the first of K+1.
struct Record {
    enum Column : int64_t {
        num_committed,
        accepted,
        row_status,
        draft_status,
        num_draft_tokens,
        finish_reason,
        tokens,
    };
};

enum class FinishReason : int64_t { none, eos, length };

// Ends a round: accepted tokens and the one after them become text, up to a stop token or the end of the budget.
struct CommitTokensParams {
    int64_t batch, lookahead, vocabulary;  // lookahead = K
    int64_t steps, capacity;               // S, L
    const int64_t* draft_tokens;           // (B, K)
    const int32_t* accepted;               // (B)
    const int64_t* next_token;             // (B)
    const int32_t* row_status;             // (B): a row whose status is not ok gains nothing and ends
    const int32_t* draft_status;           // (K, B), may be null: the same of each draft token
    const int32_t* num_draft_tokens;       // (B), may be null: draft tokens that count, if less than K
    const bool* is_stop;                   // (B, V)
    int64_t* last;                         // (B, 2): the last two tokens of each text
    int64_t* positions;                    // (B): the length of each text
    int32_t* remaining;                    // (B): tokens that may still come
    bool* active;                          // (B)
    int32_t* slots;                        // (S, B): where step s of the next round starts; -1: the row has ended
    int32_t* output_counts;                // (B, V), may be null: how often each token was generated
    int64_t* text;                         // (B, L), may be null
    int64_t* record;                       // (B, Record::tokens + K+1)

    SM_FIELDS(batch, lookahead, vocabulary, steps, capacity, draft_tokens, accepted, next_token, row_status,
              draft_status, num_draft_tokens, is_stop, last, positions, remaining, active, slots, output_counts, text,
              record)
};

// The list of all ops: what they are called everywhere, and their structs.
#define SM_FOR_EACH_OP(OP)                          \
    OP(attention_verify, AttentionParams)           \
    OP(causal_conv1d_verify, CausalConv1dParams)    \
    OP(commit_tokens, CommitTokensParams)           \
    OP(embed_tokens, EmbedTokensParams)             \
    OP(expert_linear, ExpertLinearParams)           \
    OP(mlp_activation, MlpActivationParams)         \
    OP(rms_norm, RmsNormParams)                     \
    OP(select_experts, SelectExpertsParams)         \
    OP(selective_scan_verify, SelectiveScanParams)  \
    OP(skinny_linear, SkinnyLinearParams)           \
    OP(speculative_accept, SpeculativeAcceptParams) \
    OP(ssd_verify, SsdParams)

}  // namespace speculative_mamba
