// Runs CUDA kernels on the CPU, one block after another, every thread of a block as a fiber, in a random order.
//
// Stands in for the toolkit's header of the same name. A fiber runs until it meets a barrier, a shuffle or its end; a
// barrier opens when every thread of the block that has not ended waits there, a shuffle when all lanes of the warp do.
// Every access to memory goes through check(): it must lie in memory that was announced, and must not race with another
// thread's. Two accesses to one address, one of them a store, need __syncthreads between them, or within a warp
// __syncwarp; a shuffle orders no memory, and between blocks of one launch nothing does. An atomic access counts as a
// store, but two of them do not race. A wide access is one to each of its words. An asynchronous copy happens when its
// thread waits for it; until then nobody may touch where it goes. Before a thread has waited for the kernels before, it
// may read constants alone, and none that a kernel of this call or of the call before has written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#define SM_HOST_SHIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace shim {

constexpr int kWarp = 32;
constexpr int kMultiprocessors = 3;

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Of compute capability 9.0, or what a test asks for.
size_t shared_memory_limit();

enum class Kind { load, load_constant, store, atomic };
enum class Use { constant, read, write };  // constants may be read before the kernel before has ended

struct Thread {
    int id = 0;
    bool waited = false;  // for the kernel before
};

struct BlockMemory;

// What kernels and those who launch them ask for; machine.cpp has it, so that it is compiled once.
struct Machine {
    Thread* running = nullptr;
    dim3 grid, threads, block_index;

    static Machine& get();

    // Before the memory of a call is announced. `announce` takes the larger of two sizes and the freer of two uses.
    virtual void begin_call() = 0;
    virtual void announce(const void* base, size_t bytes, Use use) = 0;
    // What kernels have written counts no longer: memory may be used anew.
    virtual void synchronize() = 0;
    virtual void seed(unsigned seed) = 0;

    // With so many bytes of launched memory for each block.
    template <typename Kernel>
    void launch(const dim3& blocks, const dim3& block_threads, size_t bytes, const Kernel& kernel) {
        run(blocks, block_threads, bytes, [](const void* body) { (*static_cast<const Kernel*>(body))(); }, &kernel);
    }

    // An access of so many bytes, which races element by element.
    virtual void check(const void* address, size_t bytes, Kind kind, size_t element = 4) = 0;
    virtual void copy_async(void* to, const void* from, int bytes, Kind kind) = 0;
    virtual void end_group_of_copies() = 0;
    virtual void wait_for_copies(int64_t going) = 0;
    // The same for all threads of a block.
    virtual char* launched_memory() = 0;
    // A variable that a block has anew; `enter` is told by each of its threads.
    virtual BlockMemory& variable(void* begin, size_t bytes, size_t granule) = 0;
    virtual void enter(BlockMemory& memory) = 0;

    virtual void wait_for_block() = 0;
    virtual void wait_for_warp() = 0;
    virtual uint64_t shuffled(uint64_t value, int from_lane) = 0;
    virtual void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                float (*widen)(uint32_t)) = 0;

 protected:
    ~Machine() = default;
    virtual void run(const dim3& blocks, const dim3& block_threads, size_t bytes, void (*call)(const void*),
                     const void* body) = 0;
};

inline dim3 thread_index() {
    Machine& m = Machine::get();
    const unsigned id = static_cast<unsigned>(m.running->id);
    return {id % m.threads.x, id / m.threads.x % m.threads.y, id / (m.threads.x * m.threads.y)};
}

template <typename T>
inline T shuffle(T value, int from_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = Machine::get().shuffled(bits, from_lane);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The tensor cores' product of a warp, for lane values as PTX's mma.m16n8k16 lays them out; `widen` makes a float of 16
// bits.
inline void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint32_t)) {
    Machine::get().multiply_tiles(c, a, b, widen);
}

// Memory of a block: all its threads see one array, whose accesses are checked like all others.
template <typename T, int N>
struct Shared {
    T data[N];
    BlockMemory& memory = Machine::get().variable(data, sizeof data, sizeof(T) < 4 ? sizeof(T) : 4);

    T* of_this_block() {
        Machine::get().enter(memory);
        return data;
    }
};

}  // namespace shim

#define threadIdx (::shim::thread_index())
#define blockIdx (::shim::Machine::get().block_index)
#define blockDim (::shim::Machine::get().threads)
#define gridDim (::shim::Machine::get().grid)

inline void __syncthreads() { shim::Machine::get().wait_for_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::Machine::get().wait_for_warp(); }
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::shuffle(value, (shim::Machine::get().running->id % shim::kWarp) ^ mask);
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int lane, int width) {
    return shim::shuffle(value, shim::Machine::get().running->id % shim::kWarp / width * width + lane % width);
}

inline float sinpif(float x) { return static_cast<float>(std::sin(3.14159265358979323846 * x)); }
inline float cospif(float x) { return static_cast<float>(std::cos(3.14159265358979323846 * x)); }
