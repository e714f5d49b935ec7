// Runs CUDA kernels on the CPU, one block after another, every thread of a block as a fiber, in a random order.
//
// Stands in for the toolkit's header of the same name. A fiber runs until it meets a barrier, a shuffle or its end; a
// barrier opens when every thread of the block that has not ended waits there, a shuffle when all lanes of the warp do.
// Every access to memory goes through check(): it must lie in memory that was announced, and must not race with another
// thread's. Two accesses to one address, one of them a store, need __syncthreads between them, or within a warp
// __syncwarp; a shuffle orders no memory, and between blocks of one launch nothing does.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

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

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Wait { nothing, block, warp, ended };

struct Fiber {
    ucontext_t context;
    jmp_buf resume;  // from then on: switching contexts asks the kernel each time, jumping does not
    bool begun = false;
    std::vector<char> stack;
    int id = 0;
    Wait wait = Wait::nothing;
    int64_t block_epoch = 0, warp_epoch = 0;  // barriers passed
    int64_t shuffles = 0;
    uint64_t lane_values[2] = {};   // of this shuffle and the one before
    uint32_t fragments[2][6] = {};  // the same of products of tensor cores: a, b
    bool waited = false;            // for the kernel before
};

// Who touched an address last.
struct Access {
    int64_t block = -1, block_epoch, warp_epoch;
    int thread;
};
struct Cell {
    Access write, read, other_read;  // two readers: different threads
};

struct Range {
    size_t bytes = 0;
    bool writable = false;
};
using Memory = std::map<uintptr_t, Range>;  // by where each begins
using Cells = std::unordered_map<uintptr_t, Cell>;

struct Machine {
    Memory memory, shared;  // of the call; of a block
    Cells cells, shared_cells;
    std::mt19937 random{1};
    std::vector<Fiber> fibers;
    jmp_buf scheduler;
    Fiber* running = nullptr;
    int64_t block = 0;
    dim3 grid, threads, block_index;
    std::function<void()> body;
    std::string error;

    static Machine& get() {
        static Machine machine;
        return machine;
    }

    [[noreturn]] void fail(const std::string& what) {
        std::ostringstream text;
        text << what << " (block " << block_index.x << "," << block_index.y << " thread " << running->id << ")";
        error = text.str();
        running->begun = false;  // it never comes back
        _longjmp(scheduler, 1);
    }

    static bool ordered(const Access& before, const Fiber& now, int64_t block) {
        if (before.block < 0) return true;
        if (before.block == block && before.thread == now.id) return true;
        if (before.block != block) return false;
        if (before.block_epoch < now.block_epoch) return true;
        return before.thread / kWarp == now.id / kWarp && before.warp_epoch < now.warp_epoch;
    }

    static const Range* range_of(const Memory& memory, uintptr_t at, size_t bytes) {
        auto found = memory.upper_bound(at);
        if (found == memory.begin()) return nullptr;
        --found;
        return at + bytes <= found->first + found->second.bytes ? &found->second : nullptr;
    }

    void check(const void* address, size_t bytes, bool write) {
        if (!running->waited) fail("memory touched before the kernel before has ended");
        const uintptr_t at = reinterpret_cast<uintptr_t>(address);
        const Range* in_shared = range_of(shared, at, bytes);
        const Range* range = in_shared ? in_shared : range_of(memory, at, bytes);
        if (!range) fail(write ? "store out of bounds" : "load out of bounds");
        if (!range->writable) {
            if (write) fail("store to memory that is read only");
            return;  // nobody to race with
        }
        Cell& cell = (in_shared ? shared_cells : cells)[at];
        const Access now{block, running->block_epoch, running->warp_epoch, running->id};
        if (!ordered(cell.write, *running, block)) fail(write ? "race: two stores" : "race: load after a store");
        if (!write) {
            if (cell.read.block >= 0 && (cell.read.thread != now.thread || cell.read.block != now.block)) {
                cell.other_read = cell.read;
            }
            cell.read = now;
            return;
        }
        if (!ordered(cell.read, *running, block) || !ordered(cell.other_read, *running, block)) {
            fail("race: store after a load");
        }
        cell.write = now;
    }

    void yield(Wait wait) {
        running->wait = wait;
        if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
    }

    // A fiber's life: one kernel after another.
    static void entry() {
        for (;;) {
            get().body();
            get().yield(Wait::ended);
        }
    }

    void resume(Fiber& f) {
        running = &f;
        if (_setjmp(scheduler) != 0) return;
        if (f.begun) _longjmp(f.resume, 1);
        f.begun = true;
        f.stack.resize(kStack);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        makecontext(&f.context, &Machine::entry, 0);
        setcontext(&f.context);
    }

    // Opens a barrier at which all wait that have not ended. Whether one opened.
    bool open_barriers() {
        bool opened = false;
        const int count = static_cast<int>(fibers.size());
        for (int first = 0; first < count; first += kWarp) {
            const int last = std::min(first + kWarp, count);
            int waiting = 0, ended = 0;
            for (int i = first; i < last; i++) {
                waiting += fibers[i].wait == Wait::warp;
                ended += fibers[i].wait == Wait::ended;
            }
            if (waiting && waiting == last - first) {
                for (int i = first; i < last; i++) fibers[i].wait = Wait::nothing;
                opened = true;
            } else if (waiting && waiting + ended == last - first) {
                error = "a shuffle waits for lanes that have ended";
            }
        }
        const bool all = std::all_of(fibers.begin(), fibers.end(),
                                     [](const Fiber& f) { return f.wait == Wait::block || f.wait == Wait::ended; });
        const bool any =
            std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.wait == Wait::block; });
        if (all && any) {
            for (Fiber& f : fibers)
                if (f.wait == Wait::block) f.wait = Wait::nothing, f.block_epoch++;
            opened = true;
        }
        return opened;
    }

    void run_block(const dim3& index, int64_t number) {
        block_index = index, block = number;
        shared_cells.clear();
        for (const auto& [begin, range] : shared)
            std::memset(reinterpret_cast<void*>(begin), 0xff, range.bytes);  // NaN
        const unsigned count = threads.x * threads.y * threads.z;
        if (fibers.size() != count) fibers = std::vector<Fiber>(count);
        for (unsigned i = 0; i < count; i++) {
            Fiber& f = fibers[i];
            if (f.wait != Wait::ended) f.begun = false;  // a fault left it in the middle of a kernel
            f.id = static_cast<int>(i), f.wait = Wait::nothing, f.waited = false,
            f.block_epoch = f.warp_epoch = f.shuffles = 0;
        }
        std::vector<int> order(count);
        for (;;) {
            order.clear();
            for (unsigned i = 0; i < count; i++)
                if (fibers[i].wait == Wait::nothing) order.push_back(static_cast<int>(i));
            std::shuffle(order.begin(), order.end(), random);
            for (int i : order) {
                resume(fibers[i]);
                if (!error.empty()) throw Failure(error);
            }
            const bool ended =
                std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.wait == Wait::ended; });
            if (ended) return;
            if (!open_barriers() && error.empty()) error = "deadlock: threads wait at different barriers";
            if (!error.empty()) throw Failure(error);
        }
    }

    void launch(const dim3& blocks, const dim3& block_threads, std::function<void()> kernel) {
        grid = blocks, threads = block_threads, body = std::move(kernel);
        cells.clear(), error.clear();
        std::vector<dim3> indices;
        for (unsigned z = 0; z < grid.z; z++)
            for (unsigned y = 0; y < grid.y; y++)
                for (unsigned x = 0; x < grid.x; x++) indices.emplace_back(x, y, z);
        std::shuffle(indices.begin(), indices.end(), random);
        for (size_t i = 0; i < indices.size(); i++) run_block(indices[i], static_cast<int64_t>(i));
    }
};

inline dim3 thread_index() {
    Machine& m = Machine::get();
    const unsigned id = static_cast<unsigned>(m.running->id);
    return {id % m.threads.x, id / m.threads.x % m.threads.y, id / (m.threads.x * m.threads.y)};
}

// Lane values travel as 64 bits. A lane's value of one shuffle is kept until it arrives at the one after the next.
template <typename T>
inline T shuffle(T value, int from_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "");
    Machine& m = Machine::get();
    Fiber& self = *m.running;
    const int64_t turn = self.shuffles++ % 2;
    std::memcpy(&self.lane_values[turn], &value, sizeof value);
    m.yield(Wait::warp);
    const Fiber& other = m.fibers[self.id / kWarp * kWarp + from_lane];
    T out;
    std::memcpy(&out, &other.lane_values[turn], sizeof out);
    return out;
}

// The tensor cores' product of a warp, for lane values as PTX's mma.m16n8k16 lays them out; `widen` makes a float of 16
// bits.
template <typename Widen>
inline void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen) {
    Machine& m = Machine::get();
    Fiber& self = *m.running;
    const int64_t turn = self.shuffles++ % 2;
    std::copy(a, a + 4, self.fragments[turn]);
    std::copy(b, b + 2, self.fragments[turn] + 4);
    m.yield(Wait::warp);
    const Fiber* warp = &m.fibers[self.id / kWarp * kWarp];
    const int lane = self.id % kWarp;
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const int quarter = k % 8 / 2, half = k / 8, shift = k % 2 * 16;
            const uint32_t left = warp[row * 4 + quarter].fragments[turn][half * 2 + i / 2];
            const uint32_t right = warp[column * 4 + quarter].fragments[turn][4 + half];
            c[i] = std::fma(widen(left >> shift), widen(right >> shift), c[i]);
        }
    }
}

// Memory of a block: all its threads see one array, whose accesses are checked like all others.
template <typename T, int N>
struct Shared {
    T data[N];
    Shared() {
        std::memset(data, 0xff, sizeof data);
        Machine::get().shared[reinterpret_cast<uintptr_t>(data)] = {sizeof data, true};
    }
};

}  // namespace shim

#define threadIdx (::shim::thread_index())
#define blockIdx (::shim::Machine::get().block_index)
#define blockDim (::shim::Machine::get().threads)
#define gridDim (::shim::Machine::get().grid)

inline void __syncthreads() { shim::Machine::get().yield(shim::Wait::block); }
inline void __syncwarp(unsigned = 0xffffffffu) {
    shim::shuffle(0, 0);
    shim::Machine::get().running->warp_epoch++;
}
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::shuffle(value, (shim::Machine::get().running->id % shim::kWarp) ^ mask);
}
