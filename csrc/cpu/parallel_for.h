// parallel_for over the pool, in the namespace of one instruction set.
#pragma once

#include "parallel.h"

namespace speculative_mamba::SM_ISA {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Work below this many multiply-adds or so is done sooner by one thread than a second one can be woken.
constexpr int64_t kWorthSharing = 32 * 1024;

// Calls body(first, last) on ranges that cover [0, items), each but the last `grain` long; `work` estimates the total
// number of multiply-adds.
template <typename Body>
inline void parallel_for(int64_t items, int64_t grain, int64_t work, int threads, const Body& body) {
    if (threads <= 1 || work < kWorthSharing || items <= grain) return body(0, items);
    struct Context {
        const Body& body;
        int64_t items, grain;
    } context{body, items, grain};
    parallel_chunks(
        divide_up(items, grain), threads,
        [](void* opaque, int64_t chunk) {
            const Context& c = *static_cast<const Context*>(opaque);
            c.body(chunk * c.grain, min(c.items, (chunk + 1) * c.grain));
        },
        &context);
}

// Of one call of an op: whether a thread comes for the first time, where each prepares for itself what all could share.
class FirstInThread {
 public:
    bool operator()() const {
        thread_local uint64_t last = 0;
        const bool is_first = last != call_;
        last = call_;
        return is_first;
    }

 private:
    static uint64_t next() {
        static uint64_t calls = 0;
        return __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    }

    const uint64_t call_ = next();
};

}  // namespace speculative_mamba::SM_ISA
