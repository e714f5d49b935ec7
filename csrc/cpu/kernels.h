// The CPU kernels: a table for each instruction set, the best of which is picked at run time.
#pragma once

#include <string>
#include <vector>

#include "../kernels.h"

namespace speculative_mamba {

using Where = int;  // threads
inline Where where_of(intptr_t threads) { return static_cast<int>(threads); }
using Kernels = KernelTable<Where>;

// Names of the instruction sets that this machine can run and this build contains, best first.
std::vector<std::string> available_isas();

// Those that can only be selected by name: they emulate instructions that the machine need not have, for tests.
std::vector<std::string> emulated_isas();

// Why there is no AMX; empty if it can be used. Asks the kernel for permission, once per process.
const std::string& obstacle_to_amx();

// The table in use: at first the best one.
const Kernels& kernels();

// Uses the named instruction set from now on. Throws std::invalid_argument if it cannot run here.
void select_isa(const std::string& name);

}  // namespace speculative_mamba
