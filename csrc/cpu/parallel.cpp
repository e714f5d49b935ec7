#include "parallel.h"

#include <pthread.h>

#include <algorithm>
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

// What one participant may claim: chunks `next` to `end` of a job, all in one word beside the job's generation.
struct Ticket {
    static constexpr int64_t kMaxChunks = UINT16_MAX;
    uint32_t generation = 0;
    uint16_t next = 0, end = 0;
};

// One participant's part of a job, on a cache line of its own: while chunks are left, hardly anybody else touches it.
struct alignas(128) Share {
    std::atomic<Ticket> ticket{Ticket{}};
    std::atomic<ChunkFunction> function{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<uint64_t> mode{0};
    std::atomic<int64_t> first{0};  // chunk of the job that a ticket counts from
    std::atomic<int> participants{0};
    std::atomic<int> done{0};  // chunks that the participant has computed, whose ever they were
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable wake;
};
static_assert(std::atomic<Ticket>::is_always_lock_free);

// One job runs at a time. Its chunks are split among the participants, the caller first; each claims its own one by
// one, then those that are left of others. A share with chunks left keeps the job from ending and its fields as they
// are, so who claims by compare-and-swap on its ticket has read fields of that job. The caller returns when every chunk
// is done, so it waits only for workers that hold one. Workers compute as the caller would: in its floating-point mode,
// and what a chunk throws is thrown by the caller.
class Pool {
 public:
    void run(int64_t chunks, int threads, ChunkFunction function, void* context) {
        grow(threads - 1);
        failure_ = nullptr;
        for (int64_t first = 0; first < chunks; first += Ticket::kMaxChunks) {
            const int64_t count = std::min(chunks - first, Ticket::kMaxChunks);
            run_some(first, count, std::min(threads, workers_ + 1), function, context);
        }
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    std::mutex busy;

 private:
    void run_some(int64_t first, int64_t chunks, int participants, ChunkFunction function, void* context) {
        const uint64_t mode = float_mode();
        // Where participant i begins. One more goes to the first ones: the caller begins before the others have heard.
        const auto part = [&](int i) { return static_cast<uint16_t>((chunks * i + participants - 1) / participants); };
        generation_++;
        for (int i = participants - 1; i >= 0; i--) {
            Share& share = shares_[i];
            share.function.store(function, std::memory_order_relaxed);
            share.context.store(context, std::memory_order_relaxed);
            share.mode.store(mode, std::memory_order_relaxed);
            share.first.store(first, std::memory_order_relaxed);
            share.participants.store(participants, std::memory_order_relaxed);
            share.done.store(0, std::memory_order_relaxed);
            share.ticket.store({generation_, part(i), part(i + 1)}, std::memory_order_release);
            // One that falls asleep at this very moment may miss the job; then others do its part.
            if (share.asleep.load(std::memory_order_relaxed)) {
                { std::lock_guard<std::mutex> lock(share.mutex); }
                share.wake.notify_one();
            }
        }
        work(0, generation_);
        const auto is_done = [&] {
            int64_t done = 0;
            for (int i = 0; i < participants; i++) done += shares_[i].done.load(std::memory_order_acquire);
            return done == chunks;
        };
        for (int spins = 0; !is_done(); spins++) {
            if (spins < 4096) relax();
            else std::this_thread::yield();
        }
    }

    // Where the system gives no more threads, those that there are do the work, from then on.
    void grow(int workers) {
        try {
            for (; workers_ < workers && workers_ < most_; workers_++)
                std::thread(&Pool::loop, this, workers_ + 1).detach();
        } catch (const std::exception&) { most_ = workers_; }
    }

    void work(int self, uint32_t generation) {
        const int participants = shares_[self].participants.load(std::memory_order_relaxed);
        for (int i = 0; i < participants; i++)
            while (claim(shares_[(self + i) % participants], shares_[self].done, generation)) {}
    }

    // Computes a chunk of a share, if one is left.
    bool claim(Share& share, std::atomic<int>& done, uint32_t generation) {
        Ticket ticket = share.ticket.load(std::memory_order_acquire);
        if (ticket.generation != generation || ticket.next == ticket.end) return false;
        ChunkFunction function = share.function.load(std::memory_order_relaxed);
        void* context = share.context.load(std::memory_order_relaxed);
        const uint64_t mode = share.mode.load(std::memory_order_relaxed);
        const int64_t chunk = share.first.load(std::memory_order_relaxed) + ticket.next;
        Ticket claimed = ticket;
        claimed.next++;
        if (!share.ticket.compare_exchange_strong(ticket, claimed, std::memory_order_acq_rel)) return true;
        if (float_mode() != mode) set_float_mode(mode);
        try {
            function(context, chunk);
        } catch (...) {
            std::lock_guard<std::mutex> lock(failing_);
            failure_ = std::current_exception();
        }
        done.store(done.load(std::memory_order_relaxed) + 1, std::memory_order_release);
        return true;
    }

    void loop(int self) {
        for (uint32_t seen = 0;;) {
            seen = wait_for_job(shares_[self], seen);
            work(self, seen);
        }
    }

    // Returns the generation of a job other than `seen`.
    static uint32_t wait_for_job(Share& share, uint32_t seen) {
        uint32_t current = seen;
        const auto arrived = [&] {
            return (current = share.ticket.load(std::memory_order_acquire).generation) != seen;
        };
        const auto spin = [&] {
            for (int i = 0; i < 64; i++, relax())
                if (arrived()) return true;
            return false;
        };
        const auto until = std::chrono::steady_clock::now() + kSpin;
        do {
            if (spin()) return current;
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(share.mutex);
        share.asleep.store(true, std::memory_order_seq_cst);
        if (!spin()) share.wake.wait(lock, arrived);
        share.asleep.store(false, std::memory_order_relaxed);
        return current;
    }

    Share shares_[kMaxWorkers + 1];  // the caller's, then the workers'
    std::mutex failing_;
    std::exception_ptr failure_;  // of any chunk; read by the caller when all are done
    uint32_t generation_ = 0;     // of the last job
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
    if (threads > 1 && chunks > 1 && busy.try_lock()) {
        workers.run(chunks, threads, function, context);
    } else {
        for (int64_t chunk = 0; chunk < chunks; chunk++) function(context, chunk);
    }
}

}  // namespace speculative_mamba
