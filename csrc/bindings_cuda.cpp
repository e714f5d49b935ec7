// The module of the CUDA kernels.
#include "cuda/kernels.h"
#include "define_ops.h"

PYBIND11_MODULE(_C_cuda, m) {
    define_ops(m);
    m.attr("architectures") = kernels().name;
}
