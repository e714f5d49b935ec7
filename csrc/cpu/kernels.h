// The table of CPU kernels: one per instruction set, the best of which is picked at run time.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace speculative_mamba {

struct Kernels {
    const char* isa;
    void (*attention)(const AttentionParams&, int threads);
    void (*causal_conv1d)(const CausalConv1dParams&, int threads);
    void (*selective_scan)(const SelectiveScanParams&, int threads);
    void (*ssd)(const SsdParams&, int threads);
    void (*skinny_linear)(const SkinnyLinearParams&, int threads);
    void (*rms_norm)(const RmsNormParams&, int threads);
    void (*gated_silu)(const GatedSiluParams&, int threads);
    void (*sample_tokens)(const SampleTokensParams&, int threads);
    void (*speculative_accept)(const SpeculativeAcceptParams&, int threads);
};

// Names of the instruction sets that this machine can run and this build contains, best first.
std::vector<std::string> available_isas();

// The table in use: at first the best one.
const Kernels& kernels();

// Uses the named instruction set from now on. Throws std::invalid_argument if it cannot run here.
void select_isa(const std::string& name);

}  // namespace speculative_mamba
