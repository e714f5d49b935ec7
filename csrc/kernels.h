// A table of kernels, one for each op. Where a call runs is a number of threads, or a stream.
#pragma once

#include "params.h"

namespace speculative_mamba {

template <typename Place>
struct KernelTable {
    const char* name;
    void (*attention)(const AttentionParams&, Place);
    void (*causal_conv1d)(const CausalConv1dParams&, Place);
    void (*selective_scan)(const SelectiveScanParams&, Place);
    void (*ssd)(const SsdParams&, Place);
    void (*skinny_linear)(const SkinnyLinearParams&, Place);
    void (*rms_norm)(const RmsNormParams&, Place);
    void (*gated_silu)(const GatedSiluParams&, Place);
    void (*speculative_accept)(const SpeculativeAcceptParams&, Place);
    void (*commit_tokens)(const CommitTokensParams&, Place);
};

}  // namespace speculative_mamba
