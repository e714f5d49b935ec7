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

void attention(const AttentionParams&, cudaStream_t);
void causal_conv1d(const CausalConv1dParams&, cudaStream_t);
void selective_scan(const SelectiveScanParams&, cudaStream_t);
void ssd(const SsdParams&, cudaStream_t);
void skinny_linear(const SkinnyLinearParams&, cudaStream_t);
void rms_norm(const RmsNormParams&, cudaStream_t);
void gated_silu(const GatedSiluParams&, cudaStream_t);
void speculative_accept(const SpeculativeAcceptParams&, cudaStream_t);
void commit_tokens(const CommitTokensParams&, cudaStream_t);

}  // namespace cuda
}  // namespace speculative_mamba
