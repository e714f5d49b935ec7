// One plain struct per op: pointers, sizes, strides in elements. No framework types, no ownership.
#pragma once

#include <cstdint>

namespace speculative_mamba {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// y = silu(causal depthwise convolution of x); the inputs are kept in `window` so that a later call can start after any
// of them.
struct CausalConv1dParams {
    int64_t batch, tokens, channels, width;
    const float* x;  // (B, T, D), channels contiguous
    int64_t x_batch_stride, x_token_stride;
    const void* weight;  // (D, W)
    int64_t weight_channel_stride, weight_tap_stride;
    DType weight_dtype;
    const float* bias;  // (D), may be null
    float* window;      // (B, W-1+S, D): row W-1+j is the input of slot j
    int64_t window_batch_stride, window_row_stride;
    const int32_t* start_slot;    // (B)
    const int32_t* null_columns;  // (B), may be null: leading tokens of a row whose input counts as 0
    int64_t write_slot;           // slot of the first token
    bool keep_last;               // prefill: only the last token's slot is kept, as slot 0
    float* y;                     // (B, T, D) contiguous
};

// Mamba-1 selective scan of T tokens per row, with the state after every token written to its slot.
struct SelectiveScanParams {
    int64_t batch, tokens, channels, state_size;
    const float* x;  // (B, T, D), channels contiguous
    int64_t x_batch_stride, x_token_stride;
    const float* dt;  // (B, T, D) before bias and softplus
    int64_t dt_batch_stride, dt_token_stride;
    const float* A;  // (D, N) contiguous
    const float* B;  // (B, T, N), states contiguous
    int64_t b_batch_stride, b_token_stride;
    const float* C;  // (B, T, N), states contiguous
    int64_t c_batch_stride, c_token_stride;
    const float* D;  // (D)
    const float* z;  // (B, T, D), may be null
    int64_t z_batch_stride, z_token_stride;
    const float* dt_bias;  // (D)
    float* states;         // (B, S, D, N), (D, N) contiguous
    int64_t states_batch_stride, states_slot_stride;
    const int32_t* start_slot;    // (B)
    const int32_t* null_columns;  // (B), may be null: leading tokens of a row that leave the state alone
    int64_t write_slot;
    bool keep_last;  // prefill: only the last state is written, to slot 0
    float* y;        // (B, T, D) contiguous
};

// y = x Wᵀ for few rows; row m of y does not depend on M.
struct SkinnyLinearParams {
    int64_t rows, in_features, out_features;
    const float* x;  // (M, K), features contiguous
    int64_t x_row_stride;
    const void* weight;  // (N, K), features contiguous
    int64_t weight_row_stride;
    DType weight_dtype;
    float* y;  // (M, N) contiguous
};

// residual_out = x + residual; y = residual_out / sqrt(mean(residual_out²) + eps) · weight
struct RmsNormParams {
    int64_t rows, features;
    const float* x;  // (M, D), features contiguous
    int64_t x_row_stride;
    const float* residual;  // (M, D) contiguous, may be null
    const void* weight;     // (D)
    DType weight_dtype;
    float eps;
    float* residual_out;  // (M, D) contiguous
    float* y;             // (M, D) contiguous
};

}  // namespace speculative_mamba
