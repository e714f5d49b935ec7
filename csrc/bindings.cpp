// The module of the CPU kernels.
#include "cpu/kernels.h"
#include "define_ops.h"

PYBIND11_MODULE(_C, m) {
    define_ops(m);
    m.attr("version") = SM_VERSION;
    m.def("available_isas", &available_isas, "Instruction sets that can run here, best first.");
    m.def("emulated_isas", &emulated_isas, "Instruction sets for tests, which can be selected but never are at first.");
    m.def("obstacle_to_amx", &obstacle_to_amx, "Why there is no AMX; empty if it can be used.");
    m.def("select_isa", &select_isa, "Uses the named instruction set from now on.");
    m.def("isa", [] { return kernels().name; }, "The instruction set in use.");
}
