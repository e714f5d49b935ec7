// The table of CUDA kernels.
#include "kernels.h"

namespace speculative_mamba {

#define SM_NAME(op, Params) cuda::op,
const Kernels& kernels() {
    static const Kernels table = {SM_CUDA_ARCHITECTURES, SM_FOR_EACH_OP(SM_NAME)};
    return table;
}

}  // namespace speculative_mamba
