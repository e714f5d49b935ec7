// The table of one instruction set; compiled once for each.
#include "kernels.h"

#define SM_STRING_(name) #name
#define SM_STRING(name) SM_STRING_(name)

namespace speculative_mamba::SM_ISA {

void attention(const AttentionParams&, int threads);
void causal_conv1d(const CausalConv1dParams&, int threads);
void selective_scan(const SelectiveScanParams&, int threads);
void ssd(const SsdParams&, int threads);
void skinny_linear(const SkinnyLinearParams&, int threads);
void rms_norm(const RmsNormParams&, int threads);
void gated_silu(const GatedSiluParams&, int threads);
void speculative_accept(const SpeculativeAcceptParams&, int threads);
void commit_tokens(const CommitTokensParams&, int threads);

extern const Kernels table;
const Kernels table = {
    SM_STRING(SM_ISA), attention, causal_conv1d, selective_scan,     ssd,
    skinny_linear,     rms_norm,  gated_silu,    speculative_accept, commit_tokens,
};

}  // namespace speculative_mamba::SM_ISA
