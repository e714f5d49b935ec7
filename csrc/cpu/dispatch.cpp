// Picks the kernels for this machine.
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace speculative_mamba {

// A set that is another one with kernels of its own for linear layers.
#define SM_LINEAR_ISA(isa, other)                       \
    namespace isa {                                     \
    void skinny_linear(const SkinnyLinearParams&, int); \
    void expert_linear(const ExpertLinearParams&, int); \
    const Kernels& table() {                            \
        static const Kernels table = [] {               \
            Kernels kernels = other::table;             \
            kernels.name = #isa;                        \
            kernels.skinny_linear = skinny_linear;      \
            kernels.expert_linear = expert_linear;      \
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
#if defined(SM_HAS_amx)
SM_LINEAR_ISA(amx, avx512)
#endif
#if defined(SM_HAS_amx_emulated)
SM_LINEAR_ISA(amx_emulated, avx2)
#endif
#if defined(SM_HAS_avx512_vnni)
SM_LINEAR_ISA(avx512_vnni, avx512)
#endif
#if defined(SM_HAS_avx_vnni)
SM_LINEAR_ISA(avx_vnni, avx2)
#endif
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#if defined(SM_HAS_neon_dotprod)
SM_LINEAR_ISA(neon_dotprod, neon)
#endif
#else
namespace baseline {
extern const Kernels table;
}
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// What keeps the process from using AMX; nothing if it may. Linux gives the memory that a thread's tiles need only to a
// process that asks, and answers for all of its threads.
std::string find_obstacle_to_amx() {
#if !defined(SM_HAS_amx)
    return "not in this build";
#elif !defined(__linux__)
    return "needs Linux";
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
    if (!has_amx || !has_avx512() || !__builtin_cpu_supports("avx512vnni")) return "the processor has none";
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
    return std::string("refused by the kernel: ") + std::strerror(errno);
#endif
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
#if defined(SM_HAS_amx)
    if (obstacle_to_amx().empty()) tables.push_back(&amx::table());
#endif
#if defined(SM_HAS_avx512_vnni)
    if (has_avx512() && __builtin_cpu_supports("avx512vnni")) tables.push_back(&avx512_vnni::table());
#endif
    if (has_avx512()) tables.push_back(&avx512::table);
#if defined(SM_HAS_avx_vnni)
    if (has_avx2() && has_avx_vnni()) tables.push_back(&avx_vnni::table());
#endif
    if (has_avx2()) tables.push_back(&avx2::table);
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

std::vector<const Kernels*> emulated() {
    std::vector<const Kernels*> tables;
#if defined(SM_HAS_amx_emulated)
    if (has_avx2()) tables.push_back(&amx_emulated::table());
#endif
    return tables;
}

std::vector<std::string> names_of(const std::vector<const Kernels*>& tables) {
    std::vector<std::string> names;
    for (const Kernels* table : tables) names.push_back(table->name);
    return names;
}

std::atomic<const Kernels*>& selected() {
    static std::atomic<const Kernels*> table{runnable().front()};
    return table;
}

}  // namespace

const std::string& obstacle_to_amx() {
#if defined(__x86_64__)
    static const std::string obstacle = find_obstacle_to_amx();
#else
    static const std::string obstacle = "the processor has none";
#endif
    return obstacle;
}

std::vector<std::string> available_isas() { return names_of(runnable()); }

std::vector<std::string> emulated_isas() { return names_of(emulated()); }

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) {
    std::string known;
    for (const auto& tables : {runnable(), emulated()})
        for (const Kernels* table : tables)
            if (name == table->name) return selected().store(table, std::memory_order_relaxed);
    for (const std::string& available : available_isas()) known += (known.empty() ? "" : ", ") + available;
    throw std::invalid_argument("instruction set '" + name + "' is not available here; choose from: " + known);
}

}  // namespace speculative_mamba
