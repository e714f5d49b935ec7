// Threads of a block as fibers, and what is checked whenever they touch memory.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cuda_runtime.h"

namespace shim {

size_t shared_memory_limit() {
    const char* asked = std::getenv("SHIM_MEMORY_OF_BLOCK");
    return asked ? std::stoul(asked) : 227 * 1024;
}

struct Range {
    size_t bytes = 0;
    Use use = Use::constant;
};
using Memory = std::map<uintptr_t, Range>;  // by where each begins

// Who touched an address last.
struct Access {
    int64_t block = -1, block_epoch = 0, warp_epoch = 0;
    int thread = -1;
};
struct Cell {
    Access store, load, other_load, atomic, other_atomic;  // what does not race with its like: by two threads
    int64_t block = -1;
};

// Memory of a block. Each begins with NaN.
struct BlockMemory {
    uintptr_t begin;
    size_t bytes, granule;
    int64_t block = -1;
    std::vector<Cell> cells = std::vector<Cell>(bytes / granule);

    bool contains(uintptr_t at, size_t size) const { return at >= begin && at + size <= begin + bytes; }
};

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kCopied = 16;  // bytes of an asynchronous copy

enum class Wait { nothing, block, warp, ended };

// Sixteen bytes on their way, of which the first `bytes` are read.
struct Copy {
    char* to;
    const char* from;
    int bytes;
    int64_t group;
};

struct Fiber : Thread {
    ucontext_t context;
    jmp_buf resume;  // from then on: switching contexts asks the kernel each time, jumping does not
    bool begun = false;
    std::unique_ptr<char[]> stack;
    Wait wait = Wait::nothing;
    int64_t block_epoch = 0, warp_epoch = 0;  // barriers passed
    int64_t shuffles = 0;
    uint64_t lane_values[2] = {};   // of this shuffle and the one before
    uint32_t fragments[2][6] = {};  // the same of products of tensor cores: a, b
    std::deque<Copy> copies;
    int64_t groups = 0;  // of copies, that have ended
};

struct State;
State& state();

struct State final : Machine {
    Memory memory;  // of the call
    std::unordered_map<uintptr_t, Cell> cells;
    std::vector<std::unordered_map<uintptr_t, Cell>> ended, ended_before;  // launches of this call, of the last
    std::deque<BlockMemory> variables;
    std::vector<BlockMemory*> block_memory;  // that the running block has asked for
    std::vector<uint64_t> launched;          // dynamic shared memory of a block, whose size the launch states
    BlockMemory launched_cells{0, 0, 4};
    std::unordered_set<uintptr_t> arriving;  // memory that copies go to, by the address of sixteen bytes
    std::mt19937 random{1};
    std::vector<Fiber> fibers;
    jmp_buf scheduler;
    int64_t block = 0;
    void (*call)(const void*) = nullptr;
    const void* body = nullptr;
    std::string error;

    Fiber& self() { return *static_cast<Fiber*>(running); }

    [[noreturn]] void fail(const std::string& what) {
        std::ostringstream text;
        text << what << " (block " << block_index.x << "," << block_index.y << " thread " << running->id << ")";
        error = text.str();
        self().begun = false;  // it never comes back
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
        const Access now{block, self().block_epoch, self().warp_epoch, running->id};
        auto after = [&](const Access& before) { return ordered(before, self(), block); };
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

    void check(const void* address, size_t bytes, Kind kind, size_t element) override {
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
        for (int i = 0; i < bytes; i++) check(address + i, 1, kind, 1);
    }

    void copy_async(void* to, const void* from, int bytes, Kind kind) override {
        if (bytes < 0 || bytes > static_cast<int>(kCopied)) fail("a copy of this size cannot be");
        if (reinterpret_cast<uintptr_t>(from) % kCopied) fail("misaligned access");
        const uintptr_t at = reinterpret_cast<uintptr_t>(to);
        if (std::none_of(block_memory.begin(), block_memory.end(), [=](auto* m) { return m->contains(at, kCopied); }))
            fail("copy to what is no memory of the block");
        check_elements(static_cast<const char*>(from), bytes, kind);
        check(to, kCopied, Kind::store, 4);
        arriving.insert(at / kCopied);
        self().copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, self().groups});
    }

    void end_group_of_copies() override { self().groups++; }

    void wait_for_copies(int64_t going) override {
        auto& copies = self().copies;
        for (; !copies.empty() && copies.front().group < self().groups - going; copies.pop_front()) {
            const Copy& copy = copies.front();
            arriving.erase(reinterpret_cast<uintptr_t>(copy.to) / kCopied);
            check(copy.to, kCopied, Kind::store, 4);
            std::memset(copy.to, 0, kCopied);
            if (copy.bytes) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        }
    }

    char* launched_memory() override {
        if (launched_cells.block != block) {
            launched_cells.block = block;
            std::fill(launched.begin(), launched.end(), ~uint64_t{0});
            block_memory.push_back(&launched_cells);
        }
        return reinterpret_cast<char*>(launched.data());
    }

    void yield(Wait wait) {
        self().wait = wait;
        if (_setjmp(self().resume) == 0) _longjmp(scheduler, 1);
    }

    // A fiber's life: one kernel after another.
    static void entry() {
        for (;;) {
            state().call(state().body);
            state().yield(Wait::ended);
        }
    }

    void resume(Fiber& f) {
        running = &f;
        if (_setjmp(scheduler) != 0) return;
        if (f.begun) _longjmp(f.resume, 1);
        f.begun = true;
        if (!f.stack) f.stack.reset(new char[kStack]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        makecontext(&f.context, &State::entry, 0);
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

    void begin_call() override {
        memory.clear();
        ended_before = std::move(ended);
        ended.clear();
    }

    void announce(const void* base, size_t bytes, Use use) override {
        auto& range = memory[reinterpret_cast<uintptr_t>(base)];
        range.bytes = std::max(range.bytes, bytes), range.use = std::max(range.use, use);
    }

    void synchronize() override { ended.clear(), ended_before.clear(); }
    void seed(unsigned seed) override { random.seed(seed); }

    BlockMemory& variable(void* begin, size_t bytes, size_t granule) override {
        return variables.emplace_back(BlockMemory{reinterpret_cast<uintptr_t>(begin), bytes, granule});
    }
    void enter(BlockMemory& memory) override {
        if (memory.block == block) return;
        memory.block = block;
        std::memset(reinterpret_cast<void*>(memory.begin), 0xff, memory.bytes);
        block_memory.push_back(&memory);
    }

    void wait_for_block() override { yield(Wait::block); }
    void wait_for_warp() override {
        shuffled(0, 0);
        self().warp_epoch++;
    }

    // Lane values travel as 64 bits. A lane's value of one shuffle is kept until it arrives at the one after the next.
    uint64_t shuffled(uint64_t value, int from_lane) override {
        const int64_t turn = self().shuffles++ % 2;
        self().lane_values[turn] = value;
        yield(Wait::warp);
        return fibers[static_cast<size_t>(running->id / kWarp * kWarp + from_lane)].lane_values[turn];
    }

    void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        float (*widen)(uint32_t)) override {
        const int64_t turn = self().shuffles++ % 2;
        std::copy(a, a + 4, self().fragments[turn]);
        std::copy(b, b + 2, self().fragments[turn] + 4);
        yield(Wait::warp);
        const Fiber* warp = &fibers[static_cast<size_t>(running->id / kWarp * kWarp)];
        const int lane = running->id % kWarp;
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

    void run(const dim3& blocks, const dim3& block_threads, size_t bytes, void (*with_body)(const void*),
             const void* kernel) override {
        if (bytes > shared_memory_limit()) throw Failure("more memory than a block can have");
        launched.assign((bytes + 15) / 16 * 2 + 2, 0);
        launched_cells.begin = reinterpret_cast<uintptr_t>(launched.data()), launched_cells.bytes = bytes;
        launched_cells.cells.resize(std::max(launched_cells.cells.size(), launched.size() * 2));
        grid = blocks, threads = block_threads, call = with_body, body = kernel;
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

State& state() {
    static State machine;
    return machine;
}

}  // namespace

Machine& Machine::get() { return state(); }

}  // namespace shim
