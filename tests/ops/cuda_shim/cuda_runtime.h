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

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
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
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr int kMultiprocessors = 3;
constexpr size_t kCopied = 16;  // bytes of an asynchronous copy

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Of compute capability 9.0, or what a test asks for.
inline size_t shared_memory_limit() {
    const char* asked = std::getenv("SHIM_MEMORY_OF_BLOCK");
    return asked ? std::stoul(asked) : 227 * 1024;
}

enum class Wait { nothing, block, warp, ended };

// Sixteen bytes on their way, of which the first `bytes` are read.
struct Copy {
    char* to;
    const char* from;
    int bytes;
    int64_t group;
};

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
    std::deque<Copy> copies;
    int64_t groups = 0;  // of copies, that have ended
};

enum class Kind { load, load_constant, store, atomic };

// Who touched an address last.
struct Access {
    int64_t block = -1, block_epoch = 0, warp_epoch = 0;
    int thread = -1;
};
struct Cell {
    Access store, load, other_load, atomic, other_atomic;  // what does not race with its like: by two threads
    int64_t block = -1;
};

enum class Use { constant, read, write };  // constants may be read before the kernel before has ended
struct Range {
    size_t bytes = 0;
    Use use = Use::constant;
};
using Memory = std::map<uintptr_t, Range>;  // by where each begins

// Memory of a block. Each begins with NaN.
struct BlockMemory {
    uintptr_t begin;
    size_t bytes, granule;
    int64_t block = -1;
    std::vector<Cell> cells = std::vector<Cell>(bytes / granule);

    bool contains(uintptr_t at, size_t size) const { return at >= begin && at + size <= begin + bytes; }
};

struct Machine {
    Memory memory;  // of the call
    std::unordered_map<uintptr_t, Cell> cells;
    std::vector<std::unordered_map<uintptr_t, Cell>> ended, ended_before;  // launches of this call, of the last
    std::vector<BlockMemory*> block_memory;                                // that the running block has asked for
    std::vector<uint64_t> launched;  // dynamic shared memory of a block, whose size the launch states
    BlockMemory launched_cells{0, 0, 4};
    std::unordered_set<uintptr_t> arriving;  // memory that copies go to, by the address of sixteen bytes
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

    bool was_written(uintptr_t at) const {
        const auto writes = [=](const auto& launch) {
            const auto found = launch.find(at);
            return found != launch.end() && (found->second.store.block >= 0 || found->second.atomic.block >= 0);
        };
        return std::any_of(ended.begin(), ended.end(), writes) ||
               std::any_of(ended_before.begin(), ended_before.end(), writes);
    }

    // Two accesses that are alike may come in any order, others not.
    void touch(Cell& cell, Kind kind) {
        const Access now{block, running->block_epoch, running->warp_epoch, running->id};
        auto after = [&](const Access& before) { return ordered(before, *running, block); };
        if (!after(cell.store)) fail(kind == Kind::load ? "race: load after a store" : "race: two stores");
        if (kind != Kind::load && !(after(cell.load) && after(cell.other_load))) fail("race: store after a load");
        if (kind != Kind::atomic && !(after(cell.atomic) && after(cell.other_atomic))) fail("race: beside an atomic");
        if (kind == Kind::store) {
            cell.store = now;
            return;
        }
        auto [last, other] =
            kind == Kind::load ? std::tie(cell.load, cell.other_load) : std::tie(cell.atomic, cell.other_atomic);
        if (last.thread != now.thread || last.block != now.block) other = last;
        last = now;
    }

    // An access of so many bytes, which races element by element.
    void check(const void* address, size_t bytes, Kind kind, size_t element = 4) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(address);
        if (at % bytes) fail("misaligned access");
        const size_t word = std::min(bytes, element);
        if (arriving.count(at / kCopied)) fail("memory touched that a copy goes to");
        for (BlockMemory* memory : block_memory) {
            if (!memory->contains(at, bytes)) continue;
            for (size_t offset = at - memory->begin; offset < at - memory->begin + bytes; offset += word) {
                Cell& cell = memory->cells[offset / memory->granule];
                if (cell.block != block) cell = {};
                cell.block = block;
                touch(cell, kind);
            }
            return;
        }
        if (!running->waited && kind != Kind::load_constant) fail("memory touched before the kernel before has ended");
        const Range* range = range_of(memory, at, bytes);
        const bool loads = kind == Kind::load || kind == Kind::load_constant;
        if (!range) fail(loads ? "load out of bounds" : "store out of bounds");
        if (!running->waited && range->use != Use::constant) fail("this is no constant");
        for (size_t offset = 0; !running->waited && offset < bytes; offset += word)
            if (was_written(at + offset)) fail("a constant that a kernel before has written");
        if (range->use != Use::write) {
            if (!loads) fail("store to memory that is read only");
            return;  // nobody to race with
        }
        for (size_t offset = 0; offset < bytes; offset += word) touch(cells[at + offset], kind);
    }

    void check_elements(const char* address, int bytes, Kind kind) {
        for (int i = 0; i < bytes; i++) check(address + i, 1, kind);
    }

    void copy_async(void* to, const void* from, int bytes, Kind kind) {
        if (bytes < 0 || bytes > static_cast<int>(kCopied)) fail("a copy of this size cannot be");
        if (reinterpret_cast<uintptr_t>(from) % kCopied) fail("misaligned access");
        const uintptr_t at = reinterpret_cast<uintptr_t>(to);
        if (std::none_of(block_memory.begin(), block_memory.end(), [=](auto* m) { return m->contains(at, kCopied); }))
            fail("copy to what is no memory of the block");
        check_elements(static_cast<const char*>(from), bytes, kind);
        check(to, kCopied, Kind::store);
        arriving.insert(at / kCopied);
        running->copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, running->groups});
    }

    void end_group_of_copies() { running->groups++; }

    void wait_for_copies(int64_t going) {
        auto& copies = running->copies;
        for (; !copies.empty() && copies.front().group < running->groups - going; copies.pop_front()) {
            const Copy& copy = copies.front();
            arriving.erase(reinterpret_cast<uintptr_t>(copy.to) / kCopied);
            check(copy.to, kCopied, Kind::store);
            std::memset(copy.to, 0, kCopied);
            if (copy.bytes) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        }
    }

    // The same for all threads of a block.
    char* launched_memory() {
        if (launched_cells.block != block) {
            launched_cells.block = block;
            std::fill(launched.begin(), launched.end(), ~uint64_t{0});
            block_memory.push_back(&launched_cells);
        }
        return reinterpret_cast<char*>(launched.data());
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

    void run_block(const dim3& index) {
        block_index = index, block++;
        block_memory.clear(), arriving.clear();
        const unsigned count = threads.x * threads.y * threads.z;
        if (fibers.size() != count) fibers = std::vector<Fiber>(count);
        for (unsigned i = 0; i < count; i++) {
            Fiber& f = fibers[i];
            if (f.wait != Wait::ended) f.begun = false;  // a fault left it in the middle of a kernel
            f.id = static_cast<int>(i), f.wait = Wait::nothing, f.waited = false,
            f.block_epoch = f.warp_epoch = f.shuffles = f.groups = 0;
            f.copies.clear();
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
            if (ended && !arriving.empty()) throw Failure("a thread ended before its copies did");
            if (ended) return;
            if (!open_barriers() && error.empty()) error = "deadlock: threads wait at different barriers";
            if (!error.empty()) throw Failure(error);
        }
    }

    // Before the memory of a call is announced.
    void begin_call() {
        memory.clear();
        ended_before = std::move(ended);
        ended.clear();
    }

    // With so many bytes of launched memory for each block.
    void launch(const dim3& blocks, const dim3& block_threads, size_t bytes, std::function<void()> kernel) {
        if (bytes > shared_memory_limit()) throw Failure("more memory than a block can have");
        launched.assign((bytes + 15) / 16 * 2 + 2, 0);
        launched_cells.begin = reinterpret_cast<uintptr_t>(launched.data()), launched_cells.bytes = bytes;
        launched_cells.cells.resize(std::max(launched_cells.cells.size(), launched.size() * 2));
        grid = blocks, threads = block_threads, body = std::move(kernel);
        cells.clear(), error.clear();
        std::vector<dim3> indices;
        for (unsigned z = 0; z < grid.z; z++)
            for (unsigned y = 0; y < grid.y; y++)
                for (unsigned x = 0; x < grid.x; x++) indices.emplace_back(x, y, z);
        std::shuffle(indices.begin(), indices.end(), random);
        for (const dim3& index : indices) run_block(index);
        ended.push_back(std::move(cells));
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
    BlockMemory memory{reinterpret_cast<uintptr_t>(data), sizeof data, std::min(sizeof(T), size_t{4})};

    T* of_this_block() {
        Machine& m = Machine::get();
        if (memory.block != m.block) {
            memory.block = m.block;
            std::memset(static_cast<void*>(data), 0xff, sizeof data);
            m.block_memory.push_back(&memory);
        }
        return data;
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
template <typename T>
inline T __shfl_sync(unsigned, T value, int lane, int width) {
    return shim::shuffle(value, shim::Machine::get().running->id % shim::kWarp / width * width + lane % width);
}

inline float sinpif(float x) { return static_cast<float>(std::sin(3.14159265358979323846 * x)); }
inline float cospif(float x) { return static_cast<float>(std::cos(3.14159265358979323846 * x)); }
