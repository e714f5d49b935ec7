// cp.async pipeline: copies into shared memory that go on while the threads of a block work.
#pragma once

#include "device.cuh"

namespace speculative_mamba::cuda {

// Memory of a block whose size its launch states, aligned to 16 bytes.
#if defined(SM_HOST_SHIM)
#define SM_LAUNCHED_MEMORY(name) char* const name = ::shim::Machine::get().launched_memory()
#else
#define SM_LAUNCHED_MEMORY(name) extern __shared__ __align__(16) char name[]
#endif

// Begins to copy the first `bytes` of 16 into shared memory; the others become zero. Constants are thought to be
// read once and bypass the nearest cache. Nobody may touch either side until the thread has waited for the copy.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes, From source = From::memory) {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().copy_async(to, from, bytes, kind_of(source));
#else
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if (source == From::constants) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
    }
#endif
}

// Makes a group of the thread's copies since the last group.
__device__ __forceinline__ void end_group_of_copies() {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().end_group_of_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Going` groups of the thread's copies are still going on, the youngest. Other threads see what
// was copied after a barrier.
template <int Going>
__device__ __forceinline__ void wait_for_copies() {
#if defined(SM_HOST_SHIM)
    shim::Machine::get().wait_for_copies(Going);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Going) : "memory");
#endif
}

}  // namespace speculative_mamba::cuda
