#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "float_mode.h"

namespace speculative_mamba {
namespace {

constexpr auto kSpin = std::chrono::microseconds(500);
constexpr int kMaxWorkers = 255;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One job runs at a time. `ticket` holds (generation << 32 | next chunk); odd generations are closed, while the fields
// of the next job are written. A worker claims a chunk by compare-and-swap on the ticket, so one that read the fields
// of another job, or fields half written, claims nothing: the generation has moved on. The caller returns when every
// chunk is done, so it waits only for workers that hold one. Workers compute as the caller would: in its floating-point
// mode, and what a chunk throws is thrown by the caller.
class Pool {
 public:
    void run(int64_t chunks, int threads, ChunkFunction function, void* context) {
        grow(threads - 1);
        // Release stores after the ticket was closed: whoever sees a new field also sees the closed ticket.
        function_.store(function, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        chunks_.store(chunks, std::memory_order_release);
        mode_.store(float_mode(), std::memory_order_release);
        failure_ = nullptr;
        participants_.store(threads - 1, std::memory_order_release);
        done_.store(0, std::memory_order_relaxed);
        uint32_t current = generation() + 1;
        ticket_.store(static_cast<uint64_t>(current) << 32, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        work(current);
        for (int spins = 0; done_.load(std::memory_order_acquire) != chunks; spins++) {
            if (spins < 4096) relax();
            else std::this_thread::yield();
        }
        ticket_.store(static_cast<uint64_t>(current + 1) << 32, std::memory_order_seq_cst);
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    std::mutex busy;

 private:
    // Where the system gives no more threads, those that there are do the work, from then on.
    void grow(int workers) {
        try {
            for (; workers_ < workers && workers_ < most_; workers_++)
                std::thread(&Pool::loop, this, workers_).detach();
        } catch (const std::exception&) { most_ = workers_; }
    }

    void work(uint32_t generation) {
        while (true) {
            uint64_t ticket = ticket_.load(std::memory_order_acquire);
            if (static_cast<uint32_t>(ticket >> 32) != generation) return;
            ChunkFunction function = function_.load(std::memory_order_acquire);
            void* context = context_.load(std::memory_order_acquire);
            const uint64_t mode = mode_.load(std::memory_order_acquire);
            int64_t chunk = static_cast<uint32_t>(ticket);
            if (chunk >= chunks_.load(std::memory_order_acquire)) return;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            if (float_mode() != mode) set_float_mode(mode);
            try {
                function(context, chunk);
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex_);
                failure_ = std::current_exception();
            }
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    void loop(int index) {
        uint32_t seen = 0;  // no open job has generation 0
        while (true) {
            seen = wait_for_job(seen);
            if (index < participants_.load(std::memory_order_acquire)) work(seen);
        }
    }

    uint32_t generation() const { return static_cast<uint32_t>(ticket_.load(std::memory_order_seq_cst) >> 32); }

    // Returns the generation of an open job other than `seen`.
    uint32_t wait_for_job(uint32_t seen) {
        uint32_t current = seen;
        auto arrived = [&] { return (current = generation()) != seen && current % 2 == 0; };
        auto until = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 64; i++, relax()) {
                if (arrived()) return current;
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, arrived);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        return current;
    }

    std::atomic<uint64_t> ticket_{uint64_t{1} << 32};
    std::atomic<ChunkFunction> function_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<uint64_t> mode_{0};
    std::atomic<int64_t> chunks_{0}, done_{0};
    std::atomic<int> participants_{0}, sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::exception_ptr failure_;  // of any chunk; read by the caller when all are done
    int workers_ = 0, most_ = kMaxWorkers;
};

std::atomic<Pool*> shared{nullptr};  // never destroyed: its threads may outlive the statics

Pool& pool() {
    // A forked child gets a pool of its own: the parent's threads are not there, and its locks may be held for ever.
    static const int once = [] {
        shared = new Pool;
        return pthread_atfork(nullptr, nullptr, [] { shared = new Pool; });
    }();
    (void)once;
    return *shared;
}

}  // namespace

void parallel_chunks(int64_t chunks, int threads, ChunkFunction function, void* context) {
    Pool& workers = pool();
    std::unique_lock<std::mutex> busy(workers.busy, std::defer_lock);
    // A second caller (another Python thread) works alone instead of queueing.
    if (threads > 1 && chunks > 1 && chunks < UINT32_MAX && busy.try_lock()) {
        workers.run(chunks, threads, function, context);
    } else {
        for (int64_t chunk = 0; chunk < chunks; chunk++) function(context, chunk);
    }
}

}  // namespace speculative_mamba
