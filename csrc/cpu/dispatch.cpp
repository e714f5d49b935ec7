// Picks the kernels for this machine.
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace speculative_mamba {

// A set that is another one with products of bytes.
#define SM_DOT_ISA(isa, other)                          \
    namespace isa {                                     \
    void skinny_linear(const SkinnyLinearParams&, int); \
    const Kernels& table() {                            \
        static const Kernels table = [] {               \
            Kernels kernels = other::table;             \
            kernels.name = #isa;                        \
            kernels.skinny_linear = skinny_linear;      \
            return kernels;                             \
        }();                                            \
        return table;                                   \
    }                                                   \
    }

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
#if defined(SM_HAS_avx512_vnni)
SM_DOT_ISA(avx512_vnni, avx512)
#endif
#if defined(SM_HAS_avx_vnni)
SM_DOT_ISA(avx_vnni, avx2)
#endif
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#if defined(SM_HAS_neon_dotprod)
SM_DOT_ISA(neon_dotprod, neon)
#endif
#else
namespace baseline {
extern const Kernels table;
}
#endif

namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;
#else
    return true;  // Apple's
#endif
}
#endif

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(SM_HAS_avx512_vnni)
        if (__builtin_cpu_supports("avx512vnni")) tables.push_back(&avx512_vnni::table());
#endif
        tables.push_back(&avx512::table);
    }
#if defined(SM_HAS_avx_vnni)
    if (has_avx2 && has_avx_vnni()) tables.push_back(&avx_vnni::table());
#endif
    if (has_avx2) tables.push_back(&avx2::table);
    tables.push_back(&baseline::table);
#elif defined(__aarch64__)
#if defined(SM_HAS_neon_dotprod)
    if (has_dotprod()) tables.push_back(&neon_dotprod::table());
#endif
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
