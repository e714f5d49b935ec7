#include "dtype.h"

#include <stdexcept>
#include <string>

namespace speculative_mamba {

void throw_unknown_dtype(DType dtype) {
    throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace speculative_mamba
