// Picks the kernels for this machine.
#include <atomic>
#include <stdexcept>

#include "kernels.h"

namespace speculative_mamba {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace baseline {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#else
namespace baseline {
extern const Kernels table;
}
#endif

namespace {

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        tables.push_back(&avx512::table);
    }
    if (has_avx2) tables.push_back(&avx2::table);
    tables.push_back(&baseline::table);
#elif defined(__aarch64__)
    tables.push_back(&neon::table);
#else
    tables.push_back(&baseline::table);
#endif
    return tables;
}

std::atomic<const Kernels*>& selected() {
    static std::atomic<const Kernels*> table{runnable().front()};
    return table;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : runnable()) names.push_back(table->name);
    return names;
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) {
    std::string known;
    for (const Kernels* table : runnable()) {
        if (name == table->name) {
            selected().store(table, std::memory_order_relaxed);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here; choose from: " + known);
}

}  // namespace speculative_mamba
