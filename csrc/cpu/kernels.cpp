// The table of one instruction set; compiled once for each.
#include "kernels.h"

#define SM_STRING_(name) #name
#define SM_STRING(name) SM_STRING_(name)

namespace speculative_mamba::SM_ISA {

#define SM_DECLARE(op, Params) void op(const Params&, int threads);
SM_FOR_EACH_OP(SM_DECLARE)

#define SM_NAME(op, Params) op,
extern const Kernels table;
const Kernels table = {SM_STRING(SM_ISA), SM_FOR_EACH_OP(SM_NAME)};

}  // namespace speculative_mamba::SM_ISA
