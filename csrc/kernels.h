// A table of kernels, one for each op. Where a call runs is a number of threads, or a stream.
#pragma once

#include "params.h"

namespace speculative_mamba {

#define SM_ENTRY(op, Params) void (*op)(const Params&, Where);
template <typename Where>
struct KernelTable {
    const char* name;
    SM_FOR_EACH_OP(SM_ENTRY)
};
#undef SM_ENTRY

// Bytes of `scratch` that a call needs. Kernels that need some declare a function of that name for their params.
template <typename Params>
int64_t scratch_bytes(const Params&) {
    return 0;
}

}  // namespace speculative_mamba
