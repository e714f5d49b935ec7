// The table of CUDA kernels.
#include "kernels.h"

namespace speculative_mamba {

const Kernels& kernels() {
    static const Kernels table = {
        SM_CUDA_ARCHITECTURES, cuda::attention, cuda::causal_conv1d, cuda::selective_scan,     cuda::ssd,
        cuda::skinny_linear,   cuda::rms_norm,  cuda::gated_silu,    cuda::speculative_accept, cuda::commit_tokens,
    };
    return table;
}

}  // namespace speculative_mamba
