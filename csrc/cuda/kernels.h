// The CUDA kernels. All pointers of the params are the device's; a call returns before the kernel has run.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"

namespace speculative_mamba {

using Where = cudaStream_t;
inline Where where_of(intptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }
using Kernels = KernelTable<Where>;

const Kernels& kernels();

namespace cuda {
#define SM_DECLARE(op, Params) void op(const Params&, cudaStream_t);
SM_FOR_EACH_OP(SM_DECLARE)
#undef SM_DECLARE
}  // namespace cuda

// What these ops need; how they lay it out is told there.
int64_t scratch_bytes(const AttentionParams&);
int64_t scratch_bytes(const ExpertLinearParams&);
int64_t scratch_bytes(const SpeculativeAcceptParams&);

}  // namespace speculative_mamba
