// The module of the CUDA kernels.
#include "cuda/kernels.h"
#include "define_ops.h"

PYBIND11_MODULE(_C_cuda, m) {
    define_ops(m);
    m.attr("version") = SM_VERSION;
    m.attr("architectures") = kernels().name;
    m.def(
        "problem",
        [] {
            int count = 0;
            const cudaError_t error = cudaGetDeviceCount(&count);
            return error == cudaSuccess ? "" : cudaGetErrorString(error);
        },
        "Why the kernels cannot run here, such as a driver that is too old for them; empty if they can.");
}
