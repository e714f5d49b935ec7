#include "dtype.h"

#include <new>
#include <stdexcept>
#include <string>

namespace speculative_mamba {

void throw_unknown_dtype(DType dtype) {
    throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

void throw_out_of_memory() { throw std::bad_alloc(); }

}  // namespace speculative_mamba
