// From a run-time dtype to a C++ storage type.
#pragma once

#include <cstdint>

#include "params.h"

namespace speculative_mamba {

struct bf16_t {
    uint16_t bits;
};
struct f16_t {
    uint16_t bits;
};

// Outside of kernels, whose files may hold no code of the standard library.
[[noreturn]] void throw_unknown_dtype(DType dtype);
[[noreturn]] void throw_out_of_memory();

}  // namespace speculative_mamba

// Runs the statements with `scalar_t` set to the storage type of `dtype`.
#define SM_DISPATCH_DTYPE(dtype, ...)                             \
    switch (dtype) {                                              \
        case ::speculative_mamba::DType::float32: {               \
            using scalar_t = float;                               \
            __VA_ARGS__;                                          \
            break;                                                \
        }                                                         \
        case ::speculative_mamba::DType::bfloat16: {              \
            using scalar_t = ::speculative_mamba::bf16_t;         \
            __VA_ARGS__;                                          \
            break;                                                \
        }                                                         \
        case ::speculative_mamba::DType::float16: {               \
            using scalar_t = ::speculative_mamba::f16_t;          \
            __VA_ARGS__;                                          \
            break;                                                \
        }                                                         \
        default: ::speculative_mamba::throw_unknown_dtype(dtype); \
    }
