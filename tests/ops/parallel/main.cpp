// Every chunk of a job is computed once, by however many threads and however uneven the work. Prints what is wrong.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <thread>

#include "../../../csrc/cpu/parallel.h"

namespace {

struct Job {
    int64_t chunks;
    int kind;  // of work
    std::unique_ptr<std::atomic<int>[]> computed;
};

void compute(void* context, int64_t chunk) {
    Job& job = *static_cast<Job*>(context);
    job.computed[chunk]++;
    const bool is_long = job.kind == 1 ? chunk == 0 : job.kind == 2 && chunk % 7 == 3;
    if (is_long) std::this_thread::sleep_for(std::chrono::microseconds(50));
    if (job.kind == 3 && chunk == job.chunks / 2) throw std::runtime_error("thrown");
}

bool is_right(int64_t chunks, int threads, int kind) {
    Job job{chunks, kind, std::make_unique<std::atomic<int>[]>(chunks)};
    bool thrown = false;
    try {
        speculative_mamba::parallel_chunks(chunks, threads, compute, &job);
    } catch (const std::runtime_error&) { thrown = true; }
    bool right = thrown == (kind == 3);
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        right = right && (job.computed[chunk] == 1 || (thrown && threads == 1));
    if (!right) std::printf("%lld chunks, %d threads, work %d\n", static_cast<long long>(chunks), threads, kind);
    return right;
}

}  // namespace

int main() {
    const int64_t sizes[] = {1, 2, 3, 7, 64, 1000, 30000, 65535, 65536, 140000};
    bool right = true;
    for (int threads : {1, 2, 3, 8})
        for (int kind = 0; kind < 4; kind++)
            for (int64_t chunks : sizes)
                for (int repeat = 0; repeat < (chunks > 100 ? 1 : 500 >> 2 * kind); repeat++)
                    if (kind != 2 || chunks < 1000) right = is_right(chunks, threads, kind) && right;
    return right ? 0 : 1;
}
